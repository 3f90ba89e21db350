"""Preloads: images fetched before a client asks for them, from lists of many formats."""
