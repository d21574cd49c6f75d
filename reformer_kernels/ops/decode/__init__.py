"""One step of cached generation in one attention layer."""
