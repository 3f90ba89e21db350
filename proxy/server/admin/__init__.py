"""The admin API: `/api/v1/` on the admin socket and `server.admin_listen`."""
