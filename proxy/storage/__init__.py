"""The store on the disk: blob files, the index of them, and the account of the space they take.

The files are the truth and the index can be rebuilt from them, except tags, pins and times of use.
"""
