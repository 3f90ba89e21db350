"""What the daemon does now and has just done: recent pulls, clients, downloads, and test pulls.

All of it is in memory: it begins with the daemon, and is not written to the store.
"""
