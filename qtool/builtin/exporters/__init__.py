"""Exporters: one checkpoint layout a module."""
