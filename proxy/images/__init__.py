"""Images in the store: list, inspect, check, pin and remove them, without contacting an upstream.

`tree` computes what an image consists of; `manage`, `inspect` and `check` are the operations.
"""
