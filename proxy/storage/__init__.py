"""Where it lies: the only code that opens data files.

The files are the truth, the index is a cache of them: it can be rebuilt, except tags, pins and
times of use. Nothing here knows of HTTP, upstreams or clients.
"""
