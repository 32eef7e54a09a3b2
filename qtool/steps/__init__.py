"""One module for each subcommand: artifacts in, artifact out."""
