"""Downloads: one fetch from upstream for each blob, written to the store while clients read it."""
