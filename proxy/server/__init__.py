"""What clients connect to: HTTP/1.1, TLS, limits and logins.

`registry` answers pulls, `admin` the operator.
"""
