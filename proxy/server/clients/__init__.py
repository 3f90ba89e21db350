"""The clients of the server: their addresses, their logins, and their shares of connections.

All limits by client are here.
"""
