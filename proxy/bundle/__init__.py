"""Bundles: images exported from a store and imported into one, as OCI image layouts in a tar."""
