"""Who we ask: the only code that dials out."""
