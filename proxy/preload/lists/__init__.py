"""The formats of image lists, one module for each kind of tool.

`formats` recognises the format of a text by its content. Pure: no I/O, no clock, no event loop.
"""

from proxy.preload.lists.formats import MAX_CHARACTERS, parse_list
from proxy.preload.lists.result import ImageList, ListEntry, ListProblem

__all__ = ["MAX_CHARACTERS", "ImageList", "ListEntry", "ListProblem", "parse_list"]
