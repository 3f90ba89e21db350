"""Downloads of blobs from upstream: clients read a blob while it arrives, and the store keeps it.

`manager` starts and finds downloads, and `download` holds the state of one. Its `fetcher` receives the
bytes from upstream, its `writer` stores them, and each response has a `reader`.
"""
