"""Image sets: the prepared format, where they come from, and the loaders that feed the networks."""
