"""Requests to upstream registries, to their mirrors and token servers.

Only this package connects to registries, and it knows nothing of the store.
"""
