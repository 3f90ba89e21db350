"""Bundles between stores, and between pullcache and the tools that read and write them."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.clients import Client, Containerd, Docker, Podman
from tests.system.images import Image, make_image
from tests.system.processes import NOWHERE, Process, run
from tests.system.servers import Daemon, Registry

MakeClient = Callable[[type[Client], str], Client]
MakeDaemon = Callable[..., Daemon]


@pytest.fixture
def bundle(upstream: Registry, daemon: Daemon, image: Image, place: Path) -> Path:
    """What store A exports of the image after all its platforms were pulled through it."""
    pull_all(daemon, image, place)
    path = place / "bundle.tar"
    daemon.run("export", image.reference, "-o", path)
    return path


@pytest.fixture
def island(make_daemon: MakeDaemon) -> Daemon:
    """Store B, which never saw an upstream."""
    return make_daemon(NOWHERE, env={"PULLCACHE_OFFLINE": "true"})


def pull_all(daemon: Daemon, image: Image, place: Path) -> None:
    source = f"docker://{daemon.address}/{image.repository}:{image.tag}"
    target = place / f"pulled-{image.tag}"
    run("skopeo", "copy", "--all", "--src-tls-verify=false", source, f"dir:{target}")


def test_an_image_runs_from_a_store_that_never_saw_an_upstream(
    bundle: Path, island: Daemon, image: Image, make_client: MakeClient
):
    island.run("import", bundle)
    for kind in (Docker, Podman, Containerd):
        client = make_client(kind, island.address)
        client.pull(image)
        assert client.run(image).strip() == image.prints
    assert island.upstream_bytes() == 0


@pytest.mark.parametrize("kind", [Docker, Podman, Containerd])
def test_clients_load_and_run_a_bundle(
    kind: type[Client], bundle: Path, image: Image, make_client: MakeClient
):
    client = make_client(kind, "127.0.0.1:9")
    client.load(bundle)
    assert client.run(image).strip() == image.prints


def test_skopeo_and_umoci_find_the_digests_that_were_pushed(
    bundle: Path, image: Image, place: Path
):
    source = f"oci-archive:{bundle}:{image.tag}"
    assert run("skopeo", "inspect", "--raw", source).encode() == image.bytes_of(image.index)
    run("skopeo", "copy", "--all", "--quiet", source, f"oci:{place}/copied:{image.tag}")
    index = json.loads((place / "copied" / "index.json").read_text())
    assert index["manifests"][0]["digest"] == image.index
    plain = place / "plain"
    plain.mkdir()
    run("tar", "-xf", bundle, "-C", plain)
    assert run("umoci", "ls", "--layout", plain).split() == [image.tag]


def test_a_bundle_of_one_platform_is_read_by_everybody(
    daemon: Daemon, upstream: Registry, image: Image, place: Path, make_client: MakeClient
):
    pull_all(daemon, image, place)
    bundle = place / "amd64.tar.zst"
    daemon.run("export", "hello", "--platform", "linux/amd64", "-o", bundle)
    run("zstd", "-dq", bundle, "-o", place / "amd64.tar")
    for kind in (Docker, Podman, Containerd):
        client = make_client(kind, "127.0.0.1:9")
        client.load(place / "amd64.tar")
        assert client.run(image).strip() == image.prints
    plain = place / "plain"
    plain.mkdir()
    run("tar", "-xf", place / "amd64.tar", "-C", plain)
    run("skopeo", "copy", "--quiet", f"oci:{plain}:{image.tag}", f"oci:{place}/one:{image.tag}")
    run("umoci", "unpack", "--image", f"{place}/one:{image.tag}", place / "unpacked")
    assert (place / "unpacked" / "rootfs" / "bin" / "busybox").exists()


def test_what_skopeo_has_written_is_imported(island: Daemon, image: Image, place: Path):
    archive = f"oci-archive:{place}/skopeo.tar:{image.reference}"
    run("skopeo", "copy", "--all", "--quiet", f"oci:{image.layout}:{image.tag}", archive)
    island.run("import", place / "skopeo.tar")
    assert island.manifest_digest(image.repository, image.tag) == image.index
    # A layout in a directory, which names no repository.
    island.run("import", image.layout, "--name", "docker.io/library/other")
    assert island.manifest_digest("library/other", image.tag) == image.index


def test_what_containerd_has_exported_is_imported(
    bundle: Path, island: Daemon, image: Image, place: Path, make_client: MakeClient
):
    client = make_client(Containerd, "127.0.0.1:9")
    assert isinstance(client, Containerd)
    client.load(bundle)
    client.save(image, place / "ctr.tar")
    island.run("import", place / "ctr.tar")
    assert island.manifest_digest(image.repository, image.tag) == image.index


def test_a_delta_holds_what_is_new_and_runs_on_the_other_side(
    daemon: Daemon,
    upstream: Registry,
    island: Daemon,
    image: Image,
    place: Path,
    bundle: Path,
    make_client: MakeClient,
):
    island.run("import", bundle)
    newer = make_image(place / "newer", tag="newer", layer_sizes=(1 << 10,))
    newer.push(upstream.address)
    pull_all(daemon, newer, place)
    delta = place / "delta.tar"
    daemon.run("export", "hello", "hello:newer", "--since", bundle, "-o", delta)
    names = run("tar", "-tf", delta).split()
    blobs = {f"sha256:{name.rpartition('/')[2]}" for name in names if name.startswith("blobs/")}
    # The layer of busybox is the same in both.
    assert {newer.index, newer.manifest, newer.layers[1]} < blobs
    assert not blobs & {image.index, image.manifest, *image.layers}
    island.run("import", delta)
    client = make_client(Docker, island.address)
    client.pull(newer)
    assert client.run(newer).strip() == newer.prints


def test_a_kill_in_the_midst_of_an_import_loses_nothing_and_leaves_nothing_half(
    island: Daemon, place: Path
):
    image = make_image(place / "large", tag="large", layer_sizes=[4 << 20] * 30)
    archive = place / "large.tar"
    run(
        *("skopeo", "copy", "--all", "--quiet", f"oci:{image.layout}:{image.tag}"),
        f"oci-archive:{archive}:{image.reference}",
    )
    fifo = place / "fifo"
    os.mkfifo(fifo)
    argv: list[str | Path] = [*island.python, "import", "--store", island.store, fifo]
    importing = Process(place / "import", "import", argv)
    content = archive.read_bytes()
    with fifo.open("wb") as pipe:
        pipe.write(content[: len(content) // 2])
        pipe.flush()
        importing.wait_until(lambda: len(stored(island)) > 10, "blobs in the store")
        island.kill()
    assert importing.wait() == 1
    before = stored(island)
    island.start()
    assert island.metric("pullcache_store_blobs") == len(stored(island)) == len(before)
    assert not list((island.store / "ingest").iterdir())
    for path in before:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    (report,) = json.loads(island.run("import", archive, "--json"))
    assert report["already_stored"] == len(before)
    assert island.manifest_digest(image.repository, image.tag) == image.index


def stored(daemon: Daemon) -> set[Path]:
    return set((daemon.store / "blobs" / "sha256").iterdir())
