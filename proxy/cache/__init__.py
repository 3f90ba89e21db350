"""The pull-through cache: decides whether a request is answered from the store or by upstream.

Nothing here listens or dials out itself: it reads `storage`, and has `download` and `upstream` fetch.
"""
