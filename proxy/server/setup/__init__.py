"""How the cache is set up: its configuration, and that of its clients."""
