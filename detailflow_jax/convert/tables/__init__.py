"""Published parameter names, one table per network."""
