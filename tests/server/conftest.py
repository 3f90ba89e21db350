"""Fixtures for tests of the server."""

import pytest

from tests.support.certificates import Authority


@pytest.fixture
async def logged(program) -> list[dict[str, object]]:
    """The request lines of the program's log."""
    lines: list[dict[str, object]] = []

    class Lines:
        is_info_enabled = True

        def enqueue(self, line: dict[str, object]) -> None:
            lines.append(line)

        def log_request(self, event: str, **fields: object) -> None:
            lines.append({"event": event, **fields})

    await program.stop()
    program.access_log = Lines()
    await program.start()
    return lines


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def local(authority):
    """A certificate of 127.0.0.1 and localhost, and its key."""
    return authority.issue("local", "IP:127.0.0.1", "DNS:localhost")


def settings(*pairs: tuple[str, str], **more: object) -> dict[str, object]:
    certificates, keys = zip(*pairs, strict=True)
    return {"tls_certificate": list(certificates), "tls_key": list(keys), **more}


@pytest.fixture
def make_secure(make_program, authority):
    """Start the program with certificates; its client trusts their authority."""

    async def make(*pairs, store=None, **more):
        return await make_program(
            trust=authority.trust(), server=settings(*pairs, **more), store=store or {}
        )

    return make


@pytest.fixture
async def secure(make_secure, local):
    return await make_secure(local)
