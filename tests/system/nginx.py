"""Debian's nginx in front of a daemon, with `config/nginx/pullcache.conf`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.ports import reserve_port
from tests.system.http_client import has_status
from tests.system.processes import Process
from tests.system.servers import Daemon

EXAMPLE = Path(__file__).parents[2] / "config" / "nginx" / "pullcache.conf"
LOCATION = "/_blobs"
# What the daemon needs behind nginx.
BEHIND_NGINX = {
    "PULLCACHE_SERVER_TRUSTED_PROXIES": "127.0.0.1/32",
    "PULLCACHE_SERVER_ACCEL_REDIRECT": LOCATION,
    "PULLCACHE_STORE_GROUP_ACCESS": "true",
}
_MAIN = """\
{user}
worker_processes {workers};
daemon off;
pid {home}/pid;
error_log {home}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  default_type application/octet-stream;
  keepalive_requests 100000000;
  client_body_temp_path {home}/body;
  proxy_temp_path {home}/proxy;
  fastcgi_temp_path {home}/fastcgi;
  uwsgi_temp_path {home}/uwsgi;
  scgi_temp_path {home}/scgi;
  include {home}/pullcache.conf;
}}
"""


def example_for(daemon: Daemon, port: int, blobs: Path, tls: tuple[str, str] | None) -> str:
    """Return the example, with the addresses and paths of a test in place of its own."""
    listen = f"127.0.0.1:{port} backlog=4096"
    replaced = {
        "server 127.0.0.1:5000;": f"server {daemon.address};",
        "listen [::]:80 backlog=4096;": "",
        "/var/cache/pullcache/blobs/": f"{blobs}/",
    }
    if tls:
        replaced |= {
            "listen 80 backlog=4096;": "",
            "#listen 443 ssl http2;": f"listen {listen} ssl http2;",
            "#ssl_certificate /etc/nginx/cache.pem;": f"ssl_certificate {tls[0]};",
            "#ssl_certificate_key /etc/nginx/cache.key;": f"ssl_certificate_key {tls[1]};",
        }
    else:
        replaced["listen 80 backlog=4096;"] = f"listen {listen};"
    text = EXAMPLE.read_text()
    for old, new in replaced.items():
        assert old in text, f"{EXAMPLE} has no {old}"
        text = text.replace(old, new)
    return text


@contextmanager
def nginx(
    directory: Path,
    daemon: Daemon,
    *,
    tls: tuple[str, str] | None = None,
    workers: int = 2,
    blobs: Path | None = None,
) -> Iterator[tuple[str, Process]]:
    """Run nginx in front of the daemon; yield its URL and its process.

    As root, its workers run as nobody, and only the group of the store gives them access to it. It looks for
    the blobs in `blobs`, if not in the store.
    """
    port = reserve_port(daemon)
    home = directory / "nginx"
    home.mkdir()
    (home / "pullcache.conf").write_text(
        example_for(daemon, port, blobs or daemon.store / "blobs", tls)
    )
    group = daemon.store.group()
    user = "" if os.geteuid() else f"user nobody {group};"
    (home / "main.conf").write_text(_MAIN.format(home=home, user=user, workers=workers))
    for path in (directory, daemon.store.parent):
        path.chmod(0o711)
    command: list[str | Path] = ["nginx", "-p", home, "-c", home / "main.conf"]
    command += ["-e", home / "error.log"]
    process = Process(home, "nginx", command)
    url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    try:
        process.wait_until(lambda: has_status(url, "/healthz"), "the daemon behind it")
        yield url, process
    finally:
        process.stop()
