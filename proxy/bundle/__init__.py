"""Bundles: stored images exported as a tar that is an OCI image layout, and imported from one.

`export` writes a bundle and `import_` reads one; `import_checks` has the conditions under which an
image is added. Nothing here contacts an upstream.
"""
