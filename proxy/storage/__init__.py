"""The store on the disk: blob files, their index, and the account of the space they take.

`blobs` has the files, `index` the SQLite index, `space` the limits and evictions, and `commit` the only
way to add content. The index can be rebuilt from the files, except tags, links, pins and times of use.
"""
