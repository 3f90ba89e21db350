"""Who asks: the only code that listens."""
