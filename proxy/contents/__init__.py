"""What is in an image: its packages, from an attached SBOM or read from its layers, and what a scanner found.

Nothing here asks an upstream. `layers.layer` and `worker` run in a process of their own, because layers are
strangers' archives; the other modules decide, or work on the index.
"""
