"""Fuzzing: random requests of clients and random responses of upstreams, against the real daemon.

A short run of each is a test. By hand, for as long as wanted:

    .venv/bin/python -m tests.fuzz clients --count 1000000
    .venv/bin/python -m tests.fuzz upstreams --count 100000
"""
