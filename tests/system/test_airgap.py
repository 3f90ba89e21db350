"""The way across an air gap: preload, export, then import and run without a network."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.clients import Client, Docker
from tests.system.images import BuiltImage, make_image
from tests.system.processes import UNREACHABLE, isolated_environment, run
from tests.system.servers import Daemon, Registry

pytestmark = pytest.mark.timeout(180)

MakeClient = Callable[[type[Client], str], Client]
MakeDaemon = Callable[..., Daemon]

BOTH_PLATFORMS = ("--platform", "linux/amd64", "--platform", "linux/arm64")


@pytest.fixture
def make_isolated_daemon(make_daemon: MakeDaemon) -> Callable[[], Daemon]:
    """Start a daemon whose upstream is a port where nothing listens."""
    return lambda: make_daemon(UNREACHABLE)


def run_failing(daemon: Daemon, *arguments: str | Path) -> tuple[int, str, str]:
    """Run a command that fails; return its exit code, stdout and stderr."""
    name, *rest = arguments
    argv = [*daemon.program, str(name), "--store", str(daemon.store), *map(str, rest)]
    done = subprocess.run(
        argv, env=isolated_environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode, done.stdout
    return done.returncode, done.stdout, done.stderr


def blobs_of(bundle: Path) -> set[str]:
    """Return the digests of a bundle's blobs."""
    names = run("tar", "-tf", bundle).split()
    assert all(name.startswith("blobs/sha256/") for name in names if "/" in name)
    return {f"sha256:{name.rpartition('/')[2]}" for name in names if "/" in name}


def all_blobs_of(image: BuiltImage) -> set[str]:
    """Return the digests of an image's blobs, of all platforms."""
    files = (image.layout / "blobs" / "sha256").iterdir()
    return {f"sha256:{file.name}" for file in files}


def write_compose(path: Path, *images: str) -> Path:
    services = "".join(f"  s{n}: {{image: '{image}'}}\n" for n, image in enumerate(images))
    path.write_text(f"services:\n{services}")
    return path


def test_a_complete_export_runs_across_the_air_gap_and_so_does_its_delta(
    upstream: Registry,
    daemon: Daemon,
    make_isolated_daemon: Callable[[], Daemon],
    image: BuiltImage,
    directory: Path,
    make_client: MakeClient,
):
    other = make_image(directory / "other", repository="me/other", tag="v1")
    other.push(upstream.address)
    compose = write_compose(directory / "compose.yaml", image.reference, "me/other:v1")
    daemon.run("preload", "-f", compose, *BOTH_PLATFORMS)
    upstream.stop()
    # check-offline accepts the complete list, and names the image that the longer one lacks.
    daemon.run("check-offline", "-f", compose, *BOTH_PLATFORMS)
    longer = write_compose(
        directory / "longer.yaml", image.reference, "me/other:v1", "me/absent:v9"
    )
    code, table, summary = run_failing(daemon, "check-offline", "-f", longer, *BOTH_PLATFORMS)
    assert code == 1
    assert "me/absent:v9" in next(line for line in table.splitlines() if "not in the store" in line)
    assert "2 of 6" in summary

    full = directory / "full.tar"
    daemon.run("export", "-f", compose, *BOTH_PLATFORMS, "-o", full)
    assert blobs_of(full) == all_blobs_of(image) | all_blobs_of(other)
    remote = make_isolated_daemon()
    remote.run("import", full)
    remote.run("check-offline", "-f", compose, *BOTH_PLATFORMS)
    client = make_client(Docker, remote.address)
    for one in (image, other):
        client.pull(one)
        assert client.run(one).strip() == one.prints

    upstream.start()
    newer = make_image(directory / "newer", tag="newer", layer_sizes=(1 << 10,))
    newer.push(upstream.address)
    daemon.run("preload", newer.reference, *BOTH_PLATFORMS)
    names = (image.reference, "me/other:v1", newer.reference)
    delta = directory / "delta.tar"
    daemon.run("export", *names, "--since", full, "-o", delta)
    assert blobs_of(delta) == all_blobs_of(newer) - all_blobs_of(image)
    empty = make_isolated_daemon()
    code, output, _ = run_failing(empty, "import", delta)
    assert code == 1
    assert output.count("not imported, ") == 3
    assert all(layer in output for layer in newer.layers if layer in image.layers)
    assert image.index in output
    remote.run("import", delta)
    client.pull(newer)
    assert client.run(newer).strip() == newer.prints
    empty.run("import", full, delta)
    assert empty.manifest_digest(newer.repository, newer.tag) == newer.index
    assert remote.upstream_bytes() == empty.upstream_bytes() == 0


def test_a_compressed_bundle_in_parts_is_imported(
    upstream: Registry,
    daemon: Daemon,
    make_isolated_daemon: Callable[[], Daemon],
    image: BuiltImage,
    directory: Path,
):
    daemon.run("preload", image.reference, *BOTH_PLATFORMS)
    bundle = directory / "bundle.tar.zst"
    daemon.run("export", image.reference, "--split", "1MB", "-o", bundle)
    parts = sorted(directory.glob("bundle.tar.zst.*"))
    assert len(parts) > 2
    run("sh", "-c", f"cat {bundle}.* | zstd -dq > {directory}/whole.tar")
    daemon.run("export", image.reference, "-o", directory / "plain.tar")
    assert (directory / "whole.tar").read_bytes() == (directory / "plain.tar").read_bytes()
    remote = make_isolated_daemon()
    remote.run("import", parts[1])
    assert remote.manifest_digest(image.repository, image.tag) == image.index


def test_files_that_the_daemon_cannot_see_are_sent_over_the_socket(
    upstream: Registry,
    daemon: Daemon,
    make_isolated_daemon: Callable[[], Daemon],
    image: BuiltImage,
    directory: Path,
):
    """Run the commands with a file system that the daemon does not have, as in a container."""
    daemon.run("preload", image.reference, *BOTH_PLATFORMS)
    daemon.run("export", image.reference, "-o", directory / "visible.tar")
    remote = make_isolated_daemon()
    private = directory / "private"
    private.mkdir()
    pullcache = " ".join(daemon.program)
    script = (
        f"set -e; mount -t tmpfs tmpfs {private}\n"
        f"{pullcache} export --store {daemon.store} {image.reference} -o {private}/b.tar\n"
        f"cmp {private}/b.tar {directory}/visible.tar\n"
        f"{pullcache} import --store {remote.store} {private}/b.tar\n"
    )
    run("unshare", "--mount", "sh", "-c", script)
    assert list(private.iterdir()) == []
    assert remote.manifest_digest(image.repository, image.tag) == image.index


def test_an_archive_of_hauler_is_imported(
    make_isolated_daemon: Callable[[], Daemon], image: BuiltImage, directory: Path
):
    """haul.tar.zst: a layout whose images have a kind and a full name, with docker's manifest.json."""
    haul = directory / "haul"
    run("cp", "-r", image.layout, haul)
    (descriptor,) = json.loads((haul / "index.json").read_text())["manifests"]
    descriptor["annotations"] = {
        "kind": "dev.hauler/imageIndex",
        "io.containerd.image.name": f"index.docker.io/{image.repository}:{image.tag}",
        "org.opencontainers.image.ref.name": f"{image.repository}:{image.tag}",
    }
    (haul / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [descriptor]}))
    (haul / "manifest.json").write_text("[]")
    run("sh", "-c", f"cd {haul} && tar -cf - . | zstd -q > {directory}/haul.tar.zst")
    remote = make_isolated_daemon()
    remote.run("import", directory / "haul.tar.zst")
    assert remote.manifest_digest(image.repository, image.tag) == image.index


def test_docker_s_own_archive_format_is_rejected_with_advice(
    upstream: Registry,
    daemon: Daemon,
    make_isolated_daemon: Callable[[], Daemon],
    image: BuiltImage,
    directory: Path,
    make_client: MakeClient,
):
    client = make_client(Docker, daemon.address)
    assert isinstance(client, Docker)
    client.pull(image)
    client.save(image, directory / "saved.tar")
    remote = make_isolated_daemon()
    code, _, errors = run_failing(remote, "import", directory / "saved.tar")
    assert code == 1
    assert "skopeo copy" in errors
    assert remote.metric("pullcache_store_blobs") == 0
