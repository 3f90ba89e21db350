"""What the log says of a client by its User-Agent."""

import pytest

from proxy.server.clients.user_agent import MAX_PRODUCT_LENGTH, UserAgent, parse_user_agent

DOCKER = (
    "docker/27.5.1 go/go1.22.11 git-commit/4c9b3b0 kernel/6.1.0-31-amd64 os/linux arch/amd64 "
    "UpstreamClient(Docker-Client/27.5.1 \\(linux\\))"
)


@pytest.mark.parametrize(
    ("header", "agent"),
    [
        (DOCKER, UserAgent("docker/27.5.1", "linux/amd64")),
        ("containerd/v2.0.5", UserAgent("containerd/v2.0.5", "")),
        ("tool/1 (linux; arm64)", UserAgent("tool/1", "linux/arm64")),
        ("", UserAgent("", "")),
        ("x" * 200, UserAgent("x" * MAX_PRODUCT_LENGTH, "")),
    ],
)
def test_the_product_and_the_platform_are_found(header, agent):
    assert parse_user_agent(header) == agent
