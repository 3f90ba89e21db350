"""The HTTP/1.1 server for clients, with TLS, connection limits and logins.

`http` is the server, and `middleware` has the steps of every request. `registry` answers pulls, and
`admin` answers the operator's commands.
"""
