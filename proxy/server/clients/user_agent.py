"""What the `User-Agent` header says of a client: its product, and its platform if it states one. Pure."""

import re
from functools import lru_cache
from typing import NamedTuple

# Characters of a product that the log shows.
MAX_PRODUCT_LENGTH = 100

_PRODUCT = re.compile(r"[^\s(]+")
# dockerd: `docker/27.5.1 go/go1.22.11 … os/linux arch/amd64 UpstreamClient(Docker-Client/27.5.1 …)`.
_DOCKER_PLATFORM = re.compile(r"\bos/([a-z0-9]+) arch/([a-z0-9]+)\b")
# Podman and skopeo state none, containerd and crane neither; Helm and ORAS may: `(linux; amd64)`.
_COMMENT_PLATFORM = re.compile(r"\((linux|windows|darwin|freebsd)[;/ ]+([a-z0-9]+)")


class UserAgent(NamedTuple):
    """The first product, such as `containerd/2.0.5`, and the platform as `os/architecture` or empty."""

    product: str
    platform: str


# A fleet has few kinds of clients.
@lru_cache(maxsize=1024)
def parse_user_agent(header: str) -> UserAgent:
    """Return what a `User-Agent` header says."""
    product = _PRODUCT.match(header.strip())
    platform = _DOCKER_PLATFORM.search(header) or _COMMENT_PLATFORM.search(header)
    return UserAgent(
        product[0][:MAX_PRODUCT_LENGTH] if product else "",
        f"{platform[1]}/{platform[2]}" if platform else "",
    )
