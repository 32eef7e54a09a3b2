"""The command line: each command parses, calls one step and prints one line. Computes nothing."""
