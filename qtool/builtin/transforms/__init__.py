"""Transforms: one file a method."""
