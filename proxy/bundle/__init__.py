"""Bundles: stored images exported as a tar that is an OCI image layout, and imported from one.

Nothing here contacts an upstream; every blob is hashed on its way out and on its way in.
"""
