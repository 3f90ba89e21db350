"""The pull-through cache: decides whether a request is answered from the store or by upstream.

It reads `storage`, and leaves all fetching to `download` and `upstream`.
"""
