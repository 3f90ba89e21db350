"""Preloads: images fetched before a client asks for them, on request or on a schedule.

`preload` runs one, `resolve` finds out what an image consists of, and `fetcher` fetches it. The
formats of image lists are in `lists`.
"""
