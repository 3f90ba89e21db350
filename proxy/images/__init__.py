"""Images in the store: list, inspect, check, pin and remove them.

Nothing here contacts an upstream; all answers come from the store and its index.
"""
