"""The client for upstream registries, their mirrors and their token servers.

`client` has the operations, and `registry_client` sends the requests of one registry or mirror.
Only this package connects to registries, and it does not use the store.
"""
