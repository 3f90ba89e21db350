"""Downloads of blobs from upstream, which clients read while they arrive and the store keeps.

`manager` starts and finds downloads, `download` holds the state of one, and `reader` reads it for a response.
"""
