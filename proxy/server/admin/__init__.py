"""The admin API, `/api/v1/`, on the admin socket and `server.admin_listen`.

Every operation of the daemon that a command needs is a route here; `api` explains how to add one.
"""
