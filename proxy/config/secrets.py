"""Files that hold secrets, and who else can read them."""

import stat

from proxy.config.schema import Config
from proxy.config.values import file_of


def exposed_files(config: Config) -> list[str]:
    """Return the files with secrets that any user of this machine can read. Blocks (one `stat` each)."""
    server = config.server
    named = [server.admin_token_file, server.htpasswd, *(server.tls_key or server.tls_certificate)]
    for upstream in config.upstreams.values():
        named += [upstream.password_file, upstream.docker_config]
    return [text for text in named if text and _is_exposed(text)]


def _is_exposed(text: str) -> bool:
    try:
        return bool(file_of(text).stat().st_mode & stat.S_IROTH)
    except OSError:
        # Whoever uses it says so.
        return False
