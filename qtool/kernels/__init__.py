"""Fast implementations of numerics' operations."""
