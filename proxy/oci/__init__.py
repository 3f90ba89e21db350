"""Formats of the OCI specifications, parsed and written: digests, references, manifests, layouts.

Nothing in this package does I/O or reads a clock.
"""
