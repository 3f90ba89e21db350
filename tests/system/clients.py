"""Debian's container clients, each with its own storage, state and socket.

Each uses the cache as a mirror, with the configuration that `pullcache client-config` writes. When
the mirror fails, a client falls back to `fallback`, by default a port where nothing listens. With a
root directory, a client is the one that is installed there (tests/newer-clients), and runs in it by
chroot; the root shares /tmp with this machine.
"""

import fcntl
import json
import re
import shutil
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from tests.system.images import MANIFEST, BuiltImage
from tests.system.processes import UNREACHABLE, Process, run

DOCKER = "/usr/bin/docker"  # Debian's, even if PATH has another one first
CONTAINERD = """\
version = 2
root = "{root}"
state = "{state}"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{socket}"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/amd64"
  snapshotter = "native"
  differ = "walking"
"""
# The name of an image in the OCI layouts that clients write.
LAYOUT_TAG = "pulled"
# The registries that clients pull from through the cache.
UPSTREAMS = ("docker.io", "private.test")


def configure(client: str, mirror: str, target: Path, fallback: str, *options: str) -> None:
    """Write the files of `pullcache client-config` for the cache at `host:port` below `target`.

    `fallback` is the URL of all registries: clients ask it when the cache fails, unless the option
    `--only` is given.
    """
    config = target.parent / f"{target.name}.toml"
    config.write_text("".join(f'[upstreams."{name}"]\nurl = "{fallback}"\n' for name in UPSTREAMS))
    command = (sys.executable, "-m", "proxy", "client-config", client)
    run(*command, *options, "--config", config, "--address", f"http://{mirror}", "--output", target)


class Client(ABC):
    """A client that pulls images of docker.io through the mirror at `host:port`."""

    def __init__(self, directory: Path, mirror: str, root: Path | None = None) -> None:
        self.directory = directory
        self.mirror = mirror
        self.fallback = UNREACHABLE
        self.only = False
        self.root = root
        directory.mkdir(parents=True)

    def _argv(self, *argv: str | Path) -> list[str | Path]:
        """Return the command line that runs the client's program, in the client's root."""
        return ["chroot", self.root, *argv] if self.root else [*argv]

    def _configure(self, client: str, name: str, *options: str) -> None:
        """Write the configuration of a kind of client into the directory `name` of this one."""
        options = (*options, "--only") if self.only else options
        configure(client, self.mirror, self.directory / name, self.fallback, *options)

    def start(self) -> None:  # most clients have no daemon  # noqa: B027
        """Start the client's daemon, if it has one, and write the client's configuration."""

    def stop(self) -> None:  # most clients have no daemon  # noqa: B027
        """Stop the client's daemon."""

    @abstractmethod
    def pull(self, image: BuiltImage) -> None: ...

    def load(self, bundle: Path) -> None:
        """Load the images of a bundle from a file."""
        raise AssertionError(f"{type(self).__name__} cannot load bundles")

    @abstractmethod
    def run(self, image: BuiltImage) -> str:
        """Run the image's command and return its output."""

    @abstractmethod
    def remove(self, image: BuiltImage) -> None:
        """Remove the image, so that the next pull requests all of it again."""


class Containerd(Client):
    def __init__(self, directory: Path, mirror: str, root: Path | None = None) -> None:
        super().__init__(directory, mirror, root)
        self.socket = directory / "sock"
        self._process: Process | None = None

    def _ctr(self, *arguments: str | Path) -> str:
        return run(*self._argv("ctr", "--address", self.socket, *arguments))

    def start(self) -> None:
        config = self.directory / "config.toml"
        root, state = self.directory / "root", self.directory / "state"
        config.write_text(CONTAINERD.format(root=root, state=state, socket=self.socket))
        self._configure("containerd", "hosts")
        argv = self._argv("containerd", "--config", config)
        self._process = process = Process(self.directory, "containerd", argv)
        booted = "containerd successfully booted"
        process.wait_until(lambda: booted in process.stderr_log.read_text(), booted)

    def stop(self) -> None:
        if self._process:
            self._process.stop()

    def load(self, bundle: Path) -> None:
        self._ctr("images", "import", "--snapshotter", "native", bundle)

    def save(self, image: BuiltImage, target: Path) -> None:
        self._ctr("images", "export", "--platform", "linux/amd64", target, image.reference)

    def pull(self, image: BuiltImage) -> None:
        hosts = self.directory / "hosts"
        native = ["--snapshotter", "native"]
        self._ctr("images", "pull", "--hosts-dir", hosts, *native, image.reference)

    def run(self, image: BuiltImage) -> str:
        name = f"test-{uuid.uuid4().hex[:12]}"
        return self._ctr("run", "--rm", "--snapshotter", "native", image.reference, name)

    def remove(self, image: BuiltImage) -> None:
        self._ctr("images", "rm", "--sync", image.reference)
        assert image.layers[-1] not in self._ctr("content", "ls", "--quiet")


class _DirectoryLock:
    """Lets the clients of one process at a time use a directory; they may be several."""

    def __init__(self) -> None:
        self._holders = 0
        self._file: TextIO | None = None

    @contextmanager
    def hold(self, directory: Path) -> Iterator[None]:
        """Hold the lock of the directory during the block."""
        if not self._file:
            directory.parent.mkdir(exist_ok=True)
            self._file = directory.with_name("lock").open("w")
            fcntl.flock(self._file, fcntl.LOCK_EX)
        self._holders += 1
        yield
        self._holders -= 1
        if not self._holders:
            self._file.close()
            self._file = None


_DIRECTORY_LOCK = _DirectoryLock()


class Docker(Client):
    def __init__(self, directory: Path, mirror: str, root: Path | None = None) -> None:
        super().__init__(directory, mirror, root)
        self._containerd = Containerd(directory / "c", mirror, root)
        self._socket = directory / "sock"
        self._process: Process | None = None
        self._certs = ExitStack()

    def command(self, *arguments: str) -> list[str | Path]:
        """Return the command line of docker with these arguments."""
        config = self.directory / "cli"
        host = f"unix://{self._socket}"
        return self._argv(DOCKER, "--config", config, "--host", host, *arguments)

    def _docker(self, *arguments: str) -> str:
        return run(*self.command(*arguments))

    def start(self) -> None:
        self._containerd.start()
        # dockerd reads the one that it needs; BuildKit in a classic docker reads hosts.toml.
        for file in ("hosts.toml",) if self.only else ("daemon.json", "hosts.toml"):
            self._configure("docker", "etc", "--docker-file", file)
        self._install_certs()
        argv = self._argv(
            *("dockerd", "--config-file", self._make_config(), "--host", f"unix://{self._socket}"),
            *("--containerd", self._containerd.socket),
            *("--data-root", self.directory / "data", "--exec-root", self.directory / "exec"),
            *("--pidfile", self.directory / "pid"),
            *("--bridge", "none", "--iptables=false", "--ip6tables=false", "--ip-forward=false"),
        )
        self._process = process = Process(self.directory, "dockerd", argv)
        listening = "API listen on"
        process.wait_until(lambda: listening in process.stderr_log.read_text(), listening)

    def _make_config(self) -> Path:
        """Return dockerd's configuration file: the printed one, and the store of these tests.

        With `only` none is printed.
        """
        path = self.directory / "etc" / "daemon.json"
        printed = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**printed, **self._store_settings()}))
        return path

    def _store_settings(self) -> dict[str, object]:
        return {"storage-driver": "vfs"}

    def _install_certs(self) -> None:
        """Install the printed `hosts.toml` in the client's root.

        dockerd reads /etc/docker/certs.d and knows no other place; BuildKit in it reads the file too.
        """
        if self.root:
            certs = self.root / "etc" / "docker" / "certs.d"
            self._certs.enter_context(_DIRECTORY_LOCK.hold(certs))
            shutil.rmtree(certs, ignore_errors=True)
            shutil.copytree(self.directory / "etc" / "certs.d", certs)

    def stop(self) -> None:
        if self._process:
            self._process.stop()
        self._containerd.stop()
        self._certs.close()

    def _name(self, image: BuiltImage) -> str:
        return image.reference.removeprefix("docker.io/").removeprefix("library/")

    def load(self, bundle: Path) -> None:
        self._docker("load", "--input", str(bundle))

    def save(self, image: BuiltImage, target: Path) -> None:
        self._docker("save", "--output", str(target), self._name(image))

    def pull(self, image: BuiltImage) -> None:
        self._docker("pull", self._name(image))

    def run(self, image: BuiltImage) -> str:
        return self._docker("run", "--rm", "--network", "none", self._name(image))

    def remove(self, image: BuiltImage) -> None:
        self._docker("rmi", self._name(image))
        assert not self._docker("images", "--quiet")

    def pull_name(self, *arguments: str) -> str:
        """Pull with the arguments of `docker pull`; return the tags and digests of all images."""
        self._docker("pull", *arguments)
        return self._docker("images", "--digests", "--format", "{{.Tag}} {{.Digest}}")

    def build(self, context: Path, name: str) -> None:
        """Build an image with BuildKit, which newer versions do by buildx, from nothing cached."""
        build = ("build", "--network", "none", "--no-cache", "--pull", "--tag", name, str(context))
        run(*self.command(*build), env={"DOCKER_BUILDKIT": "1"})
        self._docker("image", "rm", name)
        self._docker("builder", "prune", "--all", "--force")

    def search(self, words: str, *options: str) -> list[dict[str, str]]:
        """Search the mirror itself, by its address, and return one row per repository."""
        term = f"{self.mirror}/{words}"
        rows = self._docker("search", "--no-trunc", "--format", "{{json .}}", *options, term)
        return [json.loads(row) for row in rows.splitlines()]


class DockerWithContainerdStore(Docker):
    """dockerd with the containerd image store: docker 28 reads `hosts.toml`, docker 26 `registry-mirrors`."""

    def _store_settings(self) -> dict[str, object]:
        assert self.root, "the docker of Debian 12 has no containerd image store"
        return {"features": {"containerd-snapshotter": True}, "storage-driver": "native"}

    def version(self) -> tuple[int, ...]:
        """Return the version of dockerd."""
        text = self._docker("version", "--format", "{{.Server.Version}}")
        return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


class _ContainersImage(Client):
    """podman, buildah and skopeo: they share the library containers/image, and have no daemon."""

    def start(self) -> None:
        self._configure("podman", "etc")

    @property
    def registries(self) -> Path:
        return self.directory / "etc" / "pullcache.conf"

    def _with_store(self, *argv: str | Path) -> str:
        program, *arguments = argv
        store: list[str | Path] = ["--storage-driver", "vfs", "--root", self.directory / "root"]
        store += ["--runroot", self.directory / "run"]
        env = {"CONTAINERS_REGISTRIES_CONF": str(self.registries)}
        return run(*self._argv(program, *store, *arguments), env=env)


class Podman(_ContainersImage):
    def _podman(self, *arguments: str) -> str:
        directories: list[str | Path] = ["--tmpdir", self.directory / "tmp"]
        directories += ["--network-config-dir", self.directory / "networks"]
        runtime = ["--runtime", "runc", "--cgroup-manager", "cgroupfs", "--events-backend", "none"]
        return self._with_store("podman", *directories, *runtime, *arguments)

    def load(self, bundle: Path) -> None:
        self._podman("load", "--quiet", "--input", str(bundle))

    def pull(self, image: BuiltImage) -> None:
        self._podman("pull", "--quiet", image.reference)

    def run(self, image: BuiltImage) -> str:
        limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]
        return self._podman("run", "--rm", "--network", "none", *limits, image.reference)

    def remove(self, image: BuiltImage) -> None:
        self._podman("rmi", image.reference)
        assert not self._podman("images", "--quiet")

    def search(self, words: str, *options: str) -> list[dict[str, str]]:
        """Search the mirror itself, by its address, and return one row per repository."""
        term = f"{self.mirror}/{words}"
        row = "{{.Name}}\t{{.Description}}\t{{.Stars}}\t{{.Official}}"
        plain = ["--tls-verify=false", "--no-trunc", "--format", row]
        rows = self._podman("search", *plain, *options, term)
        names = ("Name", "Description", "StarCount", "IsOfficial")
        return [dict(zip(names, one.split("\t"), strict=True)) for one in rows.splitlines()]


class Buildah(_ContainersImage):
    def pull(self, image: BuiltImage) -> None:
        self._with_store("buildah", "pull", "--quiet", "--policy", "always", image.reference)

    def run(self, image: BuiltImage) -> str:
        # Newer versions raise the limits to those of a machine's PID 1, which a container may not.
        options = ("--pull-never", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")
        container = self._with_store("buildah", "from", *options, image.reference).strip()
        # Through a file, because this buildah may exit before it has copied all of a command's
        # output.
        script = f"/bin/busybox echo {image.prints} >/output"
        command = ["--isolation", "chroot", container, "--", "/bin/busybox", "sh", "-c", script]
        try:
            self._with_store("buildah", "run", *command)
            root = Path(self._with_store("buildah", "mount", container).strip())
            return (root / "output").read_text()
        finally:
            self._with_store("buildah", "rm", container)

    def remove(self, image: BuiltImage) -> None:
        self._with_store("buildah", "rmi", image.reference)
        assert not self._with_store("buildah", "images", "--quiet")


class Skopeo(_ContainersImage):
    """Copies to an OCI layout, which umoci verifies and unpacks; chroot then runs the command."""

    @property
    def _layout(self) -> Path:
        return self.directory / "layout"

    def _source(self, image: BuiltImage) -> tuple[str, ...]:
        return "--registries-conf", str(self.registries), "copy", f"docker://{image.reference}"

    def pull(self, image: BuiltImage) -> None:
        target = f"oci:{self._layout}:{LAYOUT_TAG}"
        run(*self._argv("skopeo", *self._source(image), target))

    def run(self, image: BuiltImage) -> str:
        bundle = self.directory / "bundle"
        run("umoci", "unpack", "--image", f"{self._layout}:{LAYOUT_TAG}", bundle)
        try:
            config = json.loads((bundle / "config.json").read_text())
            return run("chroot", bundle / "rootfs", *config["process"]["args"])
        finally:
            shutil.rmtree(bundle)

    def remove(self, image: BuiltImage) -> None:
        shutil.rmtree(self._layout)


class SkopeoDirect(Skopeo):
    """Pulls from the cache's own address, which needs no mirror configuration."""

    def _address(self, image: BuiltImage) -> str:
        return image.reference.replace(image.registry, self.mirror, 1)

    def _source(self, image: BuiltImage) -> tuple[str, ...]:
        return "copy", "--src-tls-verify=false", f"docker://{self._address(image)}"


class Crane(SkopeoDirect):
    """go-containerregistry's command, which pulls from the cache's own address."""

    def pull(self, image: BuiltImage) -> None:
        shutil.rmtree(self._layout, ignore_errors=True)  # crane adds to a layout
        platform = ("--platform", "linux/amd64", "--insecure")
        argv = ("crane", "pull", *platform, "--format", "oci", self._address(image), self._layout)
        run(*self._argv(*argv))
        name_image(self._layout, image)


class Oras(SkopeoDirect):
    """ORAS, which copies all platforms from the cache's own address."""

    def pull(self, image: BuiltImage) -> None:
        target = f"{self._layout}:{LAYOUT_TAG}"
        options = ("--from-plain-http", "--to-oci-layout")
        run(*self._argv("oras", "copy", *options, self._address(image), target))
        name_image(self._layout, image)


def name_image(layout: Path, image: BuiltImage) -> None:
    """Make the image of this platform the only one of an OCI layout, with the name that umoci looks for."""
    descriptor = {
        "mediaType": MANIFEST,
        "digest": image.manifest,
        "size": (layout / "blobs" / image.manifest.replace(":", "/")).stat().st_size,
        "annotations": {"org.opencontainers.image.ref.name": LAYOUT_TAG},
    }
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [descriptor]}))


CLIENTS: list[type[Client]] = [Docker, Containerd, Podman, Buildah, Skopeo, SkopeoDirect]


def newer_clients(root: Path) -> list[type[Client]]:
    """Return the clients that are installed in this root. Debian 13 has no crane."""
    packaged = {"oras": Oras, "crane": Crane}
    installed = [kind for name, kind in packaged.items() if (root / "usr" / "bin" / name).exists()]
    return [*CLIENTS, DockerWithContainerdStore, *installed]
