"""Mitigators: one file a method."""
