"""Docker Hub's own API: what it says about repositories, such as their badges.

It is asked apart from the registry, by a client with limits of its own.
"""
