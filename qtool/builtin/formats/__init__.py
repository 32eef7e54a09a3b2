"""Number formats: one file an element type."""
