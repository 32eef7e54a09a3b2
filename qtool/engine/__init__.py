"""Block-by-block execution of a model."""
