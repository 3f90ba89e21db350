"""The pull-through cache: decides whether the store or upstream answers a request.

`blobs` handles hits and misses of blobs, `manifests` handles manifests and tags, `freshness` says
how long a tag stays fresh, and `access` which digests a repository may serve. Fetching and storing
are left to `download`, `upstream` and `storage`.
"""
