"""Metrics of an executable model."""
