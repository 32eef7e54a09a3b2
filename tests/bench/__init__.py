"""Benchmarks: speed as a ratio to a peer in the same run, memory as peaks of whole processes. Not tests."""
