"""The HTTP/1.1 server for clients, with TLS, connection limits and logins.

`registry` answers pulls, and `admin` answers the operator's commands.
"""
