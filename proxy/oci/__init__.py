"""The words of the OCI specifications: digests, references, manifests.

Nothing in this package does I/O, reads a clock or knows of an event loop.
"""
