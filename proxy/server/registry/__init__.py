"""The read side of the distribution specification: manifests, blobs, tags, referrers, and search.

`router` parses the path of a request; `handlers` answers it, with `blobs` and `manifests` for
content.
"""
