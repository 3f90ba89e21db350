"""From a registry into a store, out of it as a bundle, into a store that never saw a network, and running there."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.clients import Client, Docker
from tests.system.images import Image, make_image
from tests.system.processes import NOWHERE, fenced, run
from tests.system.servers import Daemon, Registry

pytestmark = pytest.mark.timeout(180)

MakeClient = Callable[[type[Client], str], Client]
MakeDaemon = Callable[..., Daemon]

BOTH = ("--platform", "linux/amd64", "--platform", "linux/arm64")


@pytest.fixture
def islands(make_daemon: MakeDaemon) -> Callable[[], Daemon]:
    """Make stores that never saw an upstream: theirs is a port where nothing listens."""
    return lambda: make_daemon(NOWHERE)


def refused(daemon: Daemon, *arguments: str | Path) -> tuple[int, str, str]:
    """Run a command that does not end with 0; return its exit code and what it said."""
    name, *rest = arguments
    argv = [*daemon.python, str(name), "--store", str(daemon.store), *map(str, rest)]
    done = subprocess.run(
        argv, env=fenced(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode, done.stdout
    return done.returncode, done.stdout, done.stderr


def blobs_of(bundle: Path) -> set[str]:
    names = run("tar", "-tf", bundle).split()
    assert all(name.startswith("blobs/sha256/") for name in names if "/" in name)
    return {f"sha256:{name.rpartition('/')[2]}" for name in names if "/" in name}


def everything(image: Image) -> set[str]:
    """Return all digests of an image, those of every platform."""
    files = (image.layout / "blobs" / "sha256").iterdir()
    return {f"sha256:{file.name}" for file in files}


def write_compose(path: Path, *images: str) -> Path:
    services = "".join(f"  s{n}: {{image: '{image}'}}\n" for n, image in enumerate(images))
    path.write_text(f"services:\n{services}")
    return path


def test_what_is_complete_here_runs_there_and_deltas_follow(
    upstream: Registry,
    daemon: Daemon,
    islands: Callable[[], Daemon],
    image: Image,
    place: Path,
    make_client: MakeClient,
):
    other = make_image(place / "other", repository="me/other", tag="v1")
    other.push(upstream.address)
    compose = write_compose(place / "compose.yaml", image.reference, "me/other:v1")
    daemon.run("preload", "-f", compose, *BOTH)
    upstream.stop()
    # What is complete is said so, and what is not is named.
    daemon.run("check-offline", "-f", compose, *BOTH)
    more = write_compose(place / "more.yaml", image.reference, "me/other:v1", "me/absent:v9")
    code, table, verdict = refused(daemon, "check-offline", "-f", more, *BOTH)
    assert code == 1
    assert "me/absent:v9" in next(line for line in table.splitlines() if "not in the store" in line)
    assert "2 of 6" in verdict

    first = place / "first.tar"
    daemon.run("export", "-f", compose, *BOTH, "-o", first)
    assert blobs_of(first) == everything(image) | everything(other)
    there = islands()
    there.run("import", first)
    there.run("check-offline", "-f", compose, *BOTH)
    client = make_client(Docker, there.address)
    for one in (image, other):
        client.pull(one)
        assert client.run(one).strip() == one.prints

    upstream.start()
    newer = make_image(place / "newer", tag="newer", layer_sizes=(1 << 10,))
    newer.push(upstream.address)
    daemon.run("preload", newer.reference, *BOTH)
    names = (image.reference, "me/other:v1", newer.reference)
    delta = place / "second.tar"
    daemon.run("export", *names, "--since", first, "-o", delta)
    assert blobs_of(delta) == everything(newer) - everything(image)
    late = islands()
    code, said, _ = refused(late, "import", delta)
    assert code == 1
    assert said.count("not imported, ") == 3
    assert all(layer in said for layer in newer.layers if layer in image.layers)
    assert image.index in said
    there.run("import", delta)
    client.pull(newer)
    assert client.run(newer).strip() == newer.prints
    late.run("import", first, delta)
    assert late.manifest_digest(newer.repository, newer.tag) == newer.index
    assert there.upstream_bytes() == late.upstream_bytes() == 0


def test_a_bundle_in_compressed_parts_goes_the_same_way(
    upstream: Registry, daemon: Daemon, islands: Callable[[], Daemon], image: Image, place: Path
):
    daemon.run("preload", image.reference, *BOTH)
    bundle = place / "bundle.tar.zst"
    daemon.run("export", image.reference, "--split", "1MB", "-o", bundle)
    parts = sorted(place.glob("bundle.tar.zst.*"))
    assert len(parts) > 2
    run("sh", "-c", f"cat {bundle}.* | zstd -dq > {place}/whole.tar")
    daemon.run("export", image.reference, "-o", place / "plain.tar")
    assert (place / "whole.tar").read_bytes() == (place / "plain.tar").read_bytes()
    there = islands()
    there.run("import", parts[1])
    assert there.manifest_digest(image.repository, image.tag) == image.index


def test_files_that_the_daemon_cannot_see_are_sent(
    upstream: Registry, daemon: Daemon, islands: Callable[[], Daemon], image: Image, place: Path
):
    """As from a container: the command has a file system mounted that the daemon has not."""
    daemon.run("preload", image.reference, *BOTH)
    daemon.run("export", image.reference, "-o", place / "seen.tar")
    there = islands()
    apart = place / "apart"
    apart.mkdir()
    pullcache = " ".join(daemon.python)
    script = (
        f"set -e; mount -t tmpfs tmpfs {apart}\n"
        f"{pullcache} export --store {daemon.store} {image.reference} -o {apart}/b.tar\n"
        f"cmp {apart}/b.tar {place}/seen.tar\n"
        f"{pullcache} import --store {there.store} {apart}/b.tar\n"
    )
    run("unshare", "--mount", "sh", "-c", script)
    assert list(apart.iterdir()) == []
    assert there.manifest_digest(image.repository, image.tag) == image.index


def test_archives_as_hauler_makes_them_are_imported(
    islands: Callable[[], Daemon], image: Image, place: Path
):
    """haul.tar.zst: a layout whose images have a kind and a full name, and docker's manifest beside it."""
    haul = place / "haul"
    run("cp", "-r", image.layout, haul)
    (described,) = json.loads((haul / "index.json").read_text())["manifests"]
    described["annotations"] = {
        "kind": "dev.hauler/imageIndex",
        "io.containerd.image.name": f"index.docker.io/{image.repository}:{image.tag}",
        "org.opencontainers.image.ref.name": f"{image.repository}:{image.tag}",
    }
    (haul / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [described]}))
    (haul / "manifest.json").write_text("[]")
    run("sh", "-c", f"cd {haul} && tar -cf - . | zstd -q > {place}/haul.tar.zst")
    there = islands()
    there.run("import", place / "haul.tar.zst")
    assert there.manifest_digest(image.repository, image.tag) == image.index


def test_what_docker_saves_in_the_old_way_is_refused_with_what_helps(
    upstream: Registry,
    daemon: Daemon,
    islands: Callable[[], Daemon],
    image: Image,
    place: Path,
    make_client: MakeClient,
):
    client = make_client(Docker, daemon.address)
    assert isinstance(client, Docker)
    client.pull(image)
    client.save(image, place / "saved.tar")
    there = islands()
    code, _, said = refused(there, "import", place / "saved.tar")
    assert code == 1
    assert "skopeo copy" in said
    assert there.metric("pullcache_store_blobs") == 0
