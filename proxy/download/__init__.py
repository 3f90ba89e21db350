"""Downloads of blobs from upstream, which clients read while they arrive and the store keeps.

`manager` starts and finds them, `download` holds what is known of one, `reader` is what an answer reads it with.
"""
