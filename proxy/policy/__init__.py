"""Policies: which images may be pulled, judged by what is known about them.

`rules.py` finds the rule for an image, `facts.py` says what can be known of one, `judge.py` decides.
"""
