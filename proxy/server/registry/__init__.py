"""The registry API: `/v2/` and `/v1/search`."""
