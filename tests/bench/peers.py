"""Configurations of the peers: nginx for static files, nginx as a cache, docker-registry as a mirror."""

import socket
from pathlib import Path

_NGINX = """\
worker_processes 1;
master_process off;
daemon off;
pid {home}/pid;
error_log {home}/error.log;
events {{ worker_connections 4096; }}
http {{
  sendfile on;
  tcp_nopush on;
  access_log off;
  keepalive_requests 100000000;
  default_type application/octet-stream;
  client_body_temp_path {home}/body;
  proxy_temp_path {home}/proxy;
  fastcgi_temp_path {home}/fastcgi;
  uwsgi_temp_path {home}/uwsgi;
  scgi_temp_path {home}/scgi;
  {http}
  server {{
    listen 127.0.0.1:{port} backlog=1024 {tls};
    {server}
  }}
}}
"""
_TLS = "ssl_certificate {0}; ssl_certificate_key {1}; ssl_protocols TLSv1.2 TLSv1.3;"
# proxy_cache_lock: concurrent requests for the same content wait for one fetch, however long it takes.
_CACHE = "proxy_cache_path {home}/cache keys_zone=cache:16m max_size=20g use_temp_path=off;"
_CACHING = """\
location / {{
      proxy_pass {upstream};
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_cache cache;
      proxy_cache_valid 200 1h;
      proxy_cache_lock on;
      proxy_cache_lock_age 10m;
      proxy_cache_lock_timeout 10m;
    }}
"""
_MIRROR = """\
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{cache: {{blobdescriptor: inmemory}}, filesystem: {{rootdirectory: {home}/data}}}}
http: {{addr: "127.0.0.1:{port}"}}
proxy: {{remoteurl: "{upstream}"}}
"""


def free_port() -> int:
    """Return a free port: the peers do not report the port that they get for port 0."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def static_nginx(
    home: Path, port: int, root: Path, tls: tuple[str, str] | None = None, manifests: str = ""
) -> list[str | Path]:
    """Return the command of an nginx that serves the files below `root`.

    Files in directories named `manifests` are served with the media type `manifests`, if that is given.
    """
    server = f"root {root};"
    if manifests:
        server += f" location ~ /manifests/ {{ default_type {manifests}; }}"
    return _nginx(home, port, "", server, tls)


def caching_nginx(home: Path, port: int, upstream: str) -> list[str | Path]:
    """Return the command of an nginx that caches responses of `upstream`."""
    return _nginx(home, port, _CACHE.format(home=home), _CACHING.format(upstream=upstream), None)


def mirror(home: Path, port: int, upstream: str) -> list[str | Path]:
    """Return the command of docker-registry as a pull-through cache."""
    config = home / "config"
    config.write_text(_MIRROR.format(home=home, port=port, upstream=upstream))
    return ["docker-registry", "serve", config]


def _nginx(
    home: Path, port: int, http: str, server: str, tls: tuple[str, str] | None
) -> list[str | Path]:
    config = home / "config"
    secured = "ssl" if tls else ""
    http += _TLS.format(*tls) if tls else ""
    config.write_text(_NGINX.format(home=home, port=port, http=http, server=server, tls=secured))
    return ["nginx", "-p", home, "-c", config, "-e", home / "error.log"]
