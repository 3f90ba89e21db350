"""Logins at registries: challenges, tokens, and the passwords that the operator has configured.

Only this room reads passwords; it gives them to the hosts that they belong to.
"""
