"""Users of the cache for tests: htpasswd files, and the header with which their clients log in."""

import subprocess
from base64 import b64encode
from pathlib import Path


def write_htpasswd(path: Path, cost: int = 5, **passwords: str) -> str:
    """Write a file of users and passwords with the htpasswd command; return its path."""
    path.unlink(missing_ok=True)
    for user, password in passwords.items():
        create = ["-c"] if not path.exists() else []
        subprocess.run(
            ["htpasswd", "-B", "-C", str(cost), "-b", *create, str(path), user, password],
            check=True,
            capture_output=True,
        )
    return str(path)


def basic_auth(user: str, password: str) -> str:
    """Return the `Authorization` value of RFC 7617."""
    return f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"
