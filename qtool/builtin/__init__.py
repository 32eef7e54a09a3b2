"""Everything that comes with qtool, as plugins."""
