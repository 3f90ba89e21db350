"""The fleet: what the nodes of one fleet know of each other. Bytes go from node to node elsewhere.

`directory` has the interface; `alone` is for a node without a fleet, and `valkey` keeps a fleet's directory in Valkey
or Redis.
"""
