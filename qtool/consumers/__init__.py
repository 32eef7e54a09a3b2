"""What loads a checkpoint, and what it executes: one table, read by exporters and by ``qtool doctor``."""
