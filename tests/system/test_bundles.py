"""Bundles between stores, and between pullcache and other tools that read and write them."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.clients import Client, Containerd, Docker, Podman
from tests.system.images import BuiltImage, make_image
from tests.system.processes import UNREACHABLE, Process, run
from tests.system.servers import Daemon, Registry

MakeClient = Callable[[type[Client], str], Client]
MakeDaemon = Callable[..., Daemon]


@pytest.fixture
def bundle(upstream: Registry, daemon: Daemon, image: BuiltImage, directory: Path) -> Path:
    """A bundle of the image, exported after all its platforms were pulled through the daemon."""
    pull_all_platforms(daemon, image, directory)
    path = directory / "bundle.tar"
    daemon.run("export", image.reference, "-o", path)
    return path


@pytest.fixture
def offline_daemon(make_daemon: MakeDaemon) -> Daemon:
    """A second daemon, with an empty store and no upstream that can be reached."""
    return make_daemon(UNREACHABLE, env={"PULLCACHE_OFFLINE": "true"})


def pull_all_platforms(daemon: Daemon, image: BuiltImage, directory: Path) -> None:
    source = f"docker://{daemon.address}/{image.repository}:{image.tag}"
    target = directory / f"pulled-{image.tag}"
    run("skopeo", "copy", "--all", "--src-tls-verify=false", source, f"dir:{target}")


def test_clients_pull_and_run_an_imported_image_without_an_upstream(
    bundle: Path, offline_daemon: Daemon, image: BuiltImage, make_client: MakeClient
):
    offline_daemon.run("import", bundle)
    for kind in (Docker, Podman, Containerd):
        client = make_client(kind, offline_daemon.address)
        client.pull(image)
        assert client.run(image).strip() == image.prints
    assert offline_daemon.upstream_bytes() == 0


@pytest.mark.parametrize("kind", [Docker, Podman, Containerd])
def test_clients_load_and_run_a_bundle(
    kind: type[Client], bundle: Path, image: BuiltImage, make_client: MakeClient
):
    client = make_client(kind, "127.0.0.1:9")
    client.load(bundle)
    assert client.run(image).strip() == image.prints


def test_skopeo_and_umoci_read_a_bundle_with_the_digests_of_the_upstream(
    bundle: Path, image: BuiltImage, directory: Path
):
    source = f"oci-archive:{bundle}:{image.tag}"
    assert run("skopeo", "inspect", "--raw", source).encode() == image.bytes_of(image.index)
    run("skopeo", "copy", "--all", "--quiet", source, f"oci:{directory}/copied:{image.tag}")
    index = json.loads((directory / "copied" / "index.json").read_text())
    assert index["manifests"][0]["digest"] == image.index
    plain = directory / "plain"
    plain.mkdir()
    run("tar", "-xf", bundle, "-C", plain)
    assert run("umoci", "ls", "--layout", plain).split() == [image.tag]


def test_all_tools_read_a_bundle_of_one_platform(
    daemon: Daemon, upstream: Registry, image: BuiltImage, directory: Path, make_client: MakeClient
):
    pull_all_platforms(daemon, image, directory)
    bundle = directory / "amd64.tar.zst"
    daemon.run("export", "hello", "--platform", "linux/amd64", "-o", bundle)
    run("zstd", "-dq", bundle, "-o", directory / "amd64.tar")
    for kind in (Docker, Podman, Containerd):
        client = make_client(kind, "127.0.0.1:9")
        client.load(directory / "amd64.tar")
        assert client.run(image).strip() == image.prints
    plain = directory / "plain"
    plain.mkdir()
    run("tar", "-xf", directory / "amd64.tar", "-C", plain)
    run("skopeo", "copy", "--quiet", f"oci:{plain}:{image.tag}", f"oci:{directory}/one:{image.tag}")
    run("umoci", "unpack", "--image", f"{directory}/one:{image.tag}", directory / "unpacked")
    assert (directory / "unpacked" / "rootfs" / "bin" / "busybox").exists()


def test_an_archive_and_a_layout_of_skopeo_are_imported(
    offline_daemon: Daemon, image: BuiltImage, directory: Path
):
    archive = f"oci-archive:{directory}/skopeo.tar:{image.reference}"
    run("skopeo", "copy", "--all", "--quiet", f"oci:{image.layout}:{image.tag}", archive)
    offline_daemon.run("import", directory / "skopeo.tar")
    assert offline_daemon.manifest_digest(image.repository, image.tag) == image.index
    # The layout in the directory names no repository.
    offline_daemon.run("import", image.layout, "--name", "docker.io/library/other")
    assert offline_daemon.manifest_digest("library/other", image.tag) == image.index


def test_an_archive_of_containerd_is_imported(
    bundle: Path,
    offline_daemon: Daemon,
    image: BuiltImage,
    directory: Path,
    make_client: MakeClient,
):
    client = make_client(Containerd, "127.0.0.1:9")
    assert isinstance(client, Containerd)
    client.load(bundle)
    client.save(image, directory / "ctr.tar")
    offline_daemon.run("import", directory / "ctr.tar")
    assert offline_daemon.manifest_digest(image.repository, image.tag) == image.index


def test_a_delta_contains_only_new_blobs_and_its_image_runs_after_the_import(
    daemon: Daemon,
    upstream: Registry,
    offline_daemon: Daemon,
    image: BuiltImage,
    directory: Path,
    bundle: Path,
    make_client: MakeClient,
):
    offline_daemon.run("import", bundle)
    newer = make_image(directory / "newer", tag="newer", layer_sizes=(1 << 10,))
    newer.push(upstream.address)
    pull_all_platforms(daemon, newer, directory)
    delta = directory / "delta.tar"
    daemon.run("export", "hello", "hello:newer", "--since", bundle, "-o", delta)
    names = run("tar", "-tf", delta).split()
    blobs = {f"sha256:{name.rpartition('/')[2]}" for name in names if name.startswith("blobs/")}
    # Both images have the layer of busybox.
    assert {newer.index, newer.manifest, newer.layers[1]} < blobs
    assert not blobs & {image.index, image.manifest, *image.layers}
    offline_daemon.run("import", delta)
    client = make_client(Docker, offline_daemon.address)
    client.pull(newer)
    assert client.run(newer).strip() == newer.prints


def test_a_kill_during_an_import_keeps_complete_blobs_and_leaves_no_partial_ones(
    offline_daemon: Daemon, directory: Path
):
    image = make_image(directory / "large", tag="large", layer_sizes=[4 << 20] * 30)
    archive = directory / "large.tar"
    run(
        *("skopeo", "copy", "--all", "--quiet", f"oci:{image.layout}:{image.tag}"),
        f"oci-archive:{archive}:{image.reference}",
    )
    fifo = directory / "fifo"
    os.mkfifo(fifo)
    argv: list[str | Path] = [
        *offline_daemon.program,
        "import",
        "--store",
        offline_daemon.store,
        fifo,
    ]
    importer = Process(directory / "import", "import", argv)
    content = archive.read_bytes()
    with fifo.open("wb") as pipe:
        pipe.write(content[: len(content) // 2])
        pipe.flush()
        importer.wait_until(lambda: len(blob_files(offline_daemon)) > 10, "blobs in the store")
        offline_daemon.kill()
    assert importer.wait() == 1
    before = blob_files(offline_daemon)
    offline_daemon.start()
    assert (
        offline_daemon.metric("pullcache_store_blobs")
        == len(blob_files(offline_daemon))
        == len(before)
    )
    assert not list((offline_daemon.store / "ingest").iterdir())
    for path in before:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    (report,) = json.loads(offline_daemon.run("import", archive, "--json"))
    assert report["already_stored"] == len(before)
    assert offline_daemon.manifest_digest(image.repository, image.tag) == image.index


def blob_files(daemon: Daemon) -> set[Path]:
    return set((daemon.store / "blobs" / "sha256").iterdir())
