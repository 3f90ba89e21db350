"""Layers: the package databases in them, read without running or unpacking anything."""
