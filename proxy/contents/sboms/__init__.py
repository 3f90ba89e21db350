"""SBOMs: which ones are attached to an image, and how they are fetched, read and written."""
