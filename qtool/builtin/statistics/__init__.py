"""Statistics of a site's input."""
