"""Tensors in, tensors out: pure functions."""
