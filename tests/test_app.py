"""The program as a whole: a failed start says why, and a stop leaves nothing behind."""

import asyncio
import ssl

import pytest
import trustme

from proxy.errors import AddressUnavailableError, ConfigError, StorageError
from tests.fakes.faults import Fault
from tests.fakes.registry import FakeRegistry
from tests.support.program import Program


async def test_an_address_in_use_is_an_error_that_names_it(program, make_program, tmp_path):
    address = program.url.removeprefix("http://")
    with pytest.raises(AddressUnavailableError, match=rf"server\.listen: {address} cannot be used"):
        await make_program(tmp_path / "other", server={"listen": [address]})


async def test_a_store_in_use_is_an_error_that_names_its_process(program, make_program):
    with pytest.raises(StorageError, match="in use by process"):
        await make_program(program.root)


async def test_a_failed_start_ends_at_once(program, make_program, tmp_path):
    address = program.url.removeprefix("http://")
    async with asyncio.timeout(5):
        with pytest.raises(AddressUnavailableError, match=r"server\.admin_listen"):
            await make_program(
                tmp_path / "other",
                server={"listen": ["127.0.0.1:0"], "admin_listen": [address]},
            )


async def test_a_failed_start_releases_the_store(program, make_program, tmp_path):
    address = program.url.removeprefix("http://")
    with pytest.raises(AddressUnavailableError):
        await make_program(tmp_path / "other", server={"listen": [address]})
    await make_program(tmp_path / "other")


async def test_a_missing_ca_file_is_an_error_that_names_it(registry, make_program, tmp_path):
    settings = {"url": registry.url, "ca_file": str(tmp_path / "none.pem")}
    with pytest.raises(ConfigError, match=r"ca_file: .*none\.pem"):
        await make_program(upstreams={"docker.io": settings})


async def test_an_upstream_with_a_private_ca_is_reached_over_tls_only_with_its_ca_file(
    make_program, tmp_path
):
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    bundle = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(bundle))
    async with FakeRegistry(tls=context) as secure:
        assert secure.url.startswith("https://")
        image = secure.add_image(layers=[b"x" * 100_000])
        with_ca = {"docker.io": {"url": secure.url, "ca_file": str(bundle)}}
        program = await make_program(upstreams=with_ca)
        await program.pull(image)
        without_ca = await make_program(
            tmp_path / "other", upstreams={"docker.io": {"url": secure.url}}
        )
        before = len(secure.requests)
        answer = await without_ca.manifest(image)
        assert (answer.status, answer.code) == (503, "UNAVAILABLE")
        assert len(secure.requests) == before


async def test_the_daemon_listens_on_several_addresses(make_program):
    program = await make_program(server={"listen": ["127.0.0.1:0", "127.0.0.2:0"]})
    assert (await program.ask("/v2/")).status == 200
    second = program.addresses[1]
    program.url = f"http://{second}"
    assert second.startswith("127.0.0.2:")
    assert (await program.ask("/v2/")).status == 200


async def test_a_stop_ends_running_downloads(registry, program: Program):
    release = asyncio.Event()
    image = registry.add_image(layers=[b"x" * 100_000])
    registry.fail(registry.body_of(image.layers[0]), Fault(stall_at=50_000, until=release))
    await program.manifest(image)
    async with program.opened(f"/v2/library/app/blobs/{image.layers[0]}") as response:
        await response.content.readexactly(10_000)
        response.close()
    async with asyncio.timeout(5):
        await program.stop()
    release.set()
