"""What pullcache is measured beside: nginx that serves files, and docker-registry as a mirror."""

import socket
from pathlib import Path

from tests.system.processes import Process
from tests.system.wire import answers

NGINX_CONFIG = """\
worker_processes 1;
master_process off;
daemon off;
pid {home}/pid;
error_log {home}/error.log;
events {{ worker_connections 1024; }}
http {{
  sendfile on;
  tcp_nopush on;
  access_log off;
  keepalive_requests 1000000;
  default_type application/octet-stream;
  client_body_temp_path {home}/body;
  proxy_temp_path {home}/proxy;
  fastcgi_temp_path {home}/fastcgi;
  uwsgi_temp_path {home}/uwsgi;
  scgi_temp_path {home}/scgi;
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    root {root};
  }}
}}
"""
MIRROR_CONFIG = """\
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{cache: {{blobdescriptor: inmemory}}, filesystem: {{rootdirectory: {home}/data}}}}
http: {{addr: "127.0.0.1:{port}"}}
proxy: {{remoteurl: "{upstream}"}}
"""


class Peer:
    """A server of somebody else's, with its configuration in a directory of its own."""

    def __init__(self, home: Path, name: str, template: str, **values: object) -> None:
        home.mkdir(parents=True)
        # Neither tells which port it was given, so a free one is looked for.
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        config = home / "config"
        config.write_text(template.format(home=home, port=port, **values))
        argv: dict[str, list[str | Path]] = {
            "nginx": ["nginx", "-p", home, "-c", config, "-e", home / "error.log"],
            "mirror": ["docker-registry", "serve", config],
        }
        self.process = Process(home, name, argv[name])
        path = "/v2/" if name == "mirror" else str(values["probe"])
        self.process.wait_until(lambda: answers(self.url, path), "an answer")

    def stop(self) -> None:
        self.process.stop()
