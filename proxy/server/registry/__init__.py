"""The read side of the distribution specification: manifests, blobs, tags, referrers, and search."""
