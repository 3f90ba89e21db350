"""The store on the disk: blob files, their index, and the account of the space they take.

The files are authoritative: the index can be rebuilt from them, except tags, pins and times of use.
"""
