"""A registry with plausible images, and one whose texts are hostile; and a cache that has pulled them."""

import random
import time
from typing import Any

from tests.fakes.content import FakeImage
from tests.fakes.registry import FakeRegistry
from tests.support.admin_api import call
from tests.support.layers import DPKG_STATUS, OS_RELEASE, make_layer
from tests.support.program import Program
from tests.support.scanners import TRIVY, make_scanner

# Seconds between two pulls: longer than one pull lasts.
_PULL_PAUSE = 700

# A package whose words have nowhere to break.
_LONG_PACKAGE = (
    b"Package: golanggithubcontainerscommon\nSource: golanggithubcontainersimage\n"
    b"Version: 20.10.24+dfsg1.1+b12u1b6\n\n"
)

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(1)>\u202e' + "x" * 300

_DEBIAN = ("# debian.sh --arch 'amd64' out/ 'bookworm' '@1764028800'", 280_000)
_INSTALL_NGINX = (
    "RUN /bin/sh -c set -x && groupadd --system --gid 101 nginx && apt-get update && apt-get "
    "install --no-install-recommends --no-install-suggests -y nginx=${NGINX_VERSION}-${PKG_RELEASE} "
    "&& rm -rf /var/lib/apt/lists/* # buildkit"
)
_IMAGES: dict[str, list[tuple[str, int]]] = {
    "library/nginx:1.27": [
        _DEBIAN,
        (
            _INSTALL_NGINX,
            410_000,
        ),
        ("COPY docker-entrypoint.sh / # buildkit", 620),
        ("COPY 10-listen-on-ipv6-by-default.sh /docker-entrypoint.d # buildkit", 955),
    ],
    "library/postgres:17": [
        _DEBIAN,
        ("RUN /bin/sh -c set -eux; apt-get install -y gnupg", 1_100_000),
    ],
    "library/redis:7": [_DEBIAN, ("RUN /bin/sh -c set -eux; make -C /usr/src/redis", 180_000)],
    "library/alpine:3.21": [("ADD alpine-minirootfs-3.21.0-x86_64.tar.gz / # buildkit", 36_000)],
    "library/python:3.13-slim": [
        _DEBIAN,
        ("RUN /bin/sh -c set -eux; ./configure --enable-shared", 520_000),
    ],
    "grafana/grafana:11.4.0": [("COPY /tmp/grafana /usr/share/grafana # buildkit", 1_400_000)],
    "prom/prometheus:v3.0.1": [("COPY prometheus /bin/prometheus # buildkit", 950_000)],
    "homeassistant/home-assistant:2026.11": [("RUN uv pip install -r requirements.txt", 2_300_000)],
}


def _details(layers: list[tuple[str, int]]) -> dict[str, Any]:
    return {
        "created": "2026-11-21T04:12:45Z",
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Entrypoint": ["/docker-entrypoint.sh"],
            "Cmd": ["nginx", "-g", "daemon off;"],
            "ExposedPorts": {"80/tcp": {}},
            "Labels": {"org.opencontainers.image.source": "https://github.com/nginx/docker-nginx"},
        },
        "history": [{"created_by": command} for command, _ in layers],
    }


def push_images(registry: FakeRegistry) -> dict[str, FakeImage]:
    """Push the images; their layers are random bytes of their sizes, the same for the same command."""
    images = {}
    for name, layers in _IMAGES.items():
        repository, _, tag = name.partition(":")
        contents = [random.Random(command).randbytes(size) for command, size in layers]
        images[name] = registry.add_image(
            repository,
            tag,
            contents,
            index=True,
            platforms=("linux/amd64", "linux/arm64"),
            details=_details(layers),
        )
    images["acme/hostile:latest"] = registry.add_image(
        "acme/hostile",
        layers=[b"hostile"],
        details={
            "created": HOSTILE,
            "config": {"Labels": {HOSTILE: HOSTILE}, "Env": [HOSTILE], "Cmd": [HOSTILE]},
            "history": [{"created_by": HOSTILE}],
        },
    )
    return images


def _pulls_of(number: int) -> int:
    """Return how often an image is pulled."""
    return 1 + (number * 7) % 5


async def fill(program: Program, registry: FakeRegistry, *, hostile: bool = True) -> None:
    """Pull the images at different times, some of them often, and one only in part."""
    images = push_images(registry)
    if not hostile:
        images.popitem()
    # Ends now, because the times of files are those of the machine.
    program.clock.now = time.time() - _PULL_PAUSE * sum(map(_pulls_of, range(len(images))))
    for number, (name, image) in enumerate(images.items()):
        for _ in range(_pulls_of(number)):
            program.clock.advance(_PULL_PAUSE)
            if name.startswith("homeassistant"):
                await program.manifest(image, image.tag or "")
                await program.manifest(image, image.manifest)
            else:
                await program.pull(image)
    await program.wait_for_downloads()
    await _add_packages(program, registry)


async def _add_packages(program: Program, registry: FakeRegistry) -> None:
    """Pull an image with packages, read and scan it; the names of one are hostile."""
    hostile = f"Package: {HOSTILE}\nVersion: {HOSTILE}\n\n".encode()
    status = hostile + _LONG_PACKAGE + DPKG_STATUS
    layer = make_layer({"var/lib/dpkg/status": status, "etc/os-release": OS_RELEASE})
    await program.pull(registry.add_image("library/debian", "12", [layer]))
    await program.wait_for_downloads()
    scanner = make_scanner(program.root.parent, TRIVY)
    assert await program.reload(contents={"scanner": scanner})
    await call(program, "get", "/api/v1/images/contents", image="debian:12")
    await call(program, "post", "/api/v1/images/scan", {"image": "debian:12"})
