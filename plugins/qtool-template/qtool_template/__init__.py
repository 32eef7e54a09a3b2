"""A whole qtool plugin to copy: one transform, its hook and its test."""
