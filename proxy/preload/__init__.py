"""Preloads: images fetched before a client asks for them, on request or on a schedule.

`lists` reads the formats in which people keep lists of images.
"""
