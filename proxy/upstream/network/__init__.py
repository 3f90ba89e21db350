"""The way to an upstream: sessions, proxies, redirects, retries, and the addresses that are allowed.

Nothing in it knows registries.
"""
