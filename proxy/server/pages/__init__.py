"""The pages: what is cached, whether it is used, and what to do about it, for a browser.

`page.py` has the parts of a page and says how to add one; `views` has the pages.
"""
