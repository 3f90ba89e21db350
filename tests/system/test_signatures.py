"""Signatures with cosign, notation and oras: through the cache as directly, also without the registry.

Four situations: online; with the registry down; offline after a preload; and in another cache after an export
and an import. Each asks a registry without the referrers API and one with it. The clients are those of
tests/newer-clients; without them the tests are skipped.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.processes import run
from tests.system.referrers_registry import ReferrersRegistry
from tests.system.servers import Daemon, Registry

NAME = "library/app"
SITUATIONS = ["online", "upstream down", "offline after preload", "after export and import"]

AnyRegistry = Registry | ReferrersRegistry


class Tools:
    """The programs in the root of a newer Debian; files are shared with it in `directory`."""

    def __init__(self, root: Path, directory: Path) -> None:
        self.root = root
        self.directory = directory
        self.key = directory / "signer"

    def has(self, program: str) -> bool:
        return (self.root / "usr" / "bin" / program).exists()

    def run(self, *argv: str | Path) -> str:
        env = ["env", f"HOME={self.directory}", "COSIGN_PASSWORD=", "SIGSTORE_NO_CACHE=1"]
        shell = ["sh", "-c", f'cd {self.directory} && exec "$@"', "sh"]
        return run("chroot", self.root, *env, *shell, *argv)

    def cosign_version(self) -> int:
        text = run("chroot", self.root, "dpkg-query", "-W", "-f", "${Version}", "cosign")
        return int(text.partition(".")[0])

    def make_key(self) -> None:
        self.run("cosign", "generate-key-pair", "--output-key-prefix", self.key)

    def sign(self, reference: str, *options: str) -> None:
        config = ["--use-signing-config=false"] if self.cosign_version() >= 3 else []
        options = ("--tlog-upload=false", "--allow-http-registry", "--yes", *config, *options)
        self.run("cosign", "sign", "--key", f"{self.key}.key", *options, reference)

    def attest(self, reference: str, predicate: Path, *options: str) -> None:
        config = ["--use-signing-config=false"] if self.cosign_version() >= 3 else []
        options = ("--tlog-upload=false", "--allow-http-registry", "--yes", *config, *options)
        what = ("--type", "custom", "--predicate", str(predicate))
        self.run("cosign", "attest", "--key", f"{self.key}.key", *what, *options, reference)

    def verify(self, reference: str, *options: str) -> list[Any]:
        """Return what cosign verified, without the name by which the image was asked for."""
        options = ("--insecure-ignore-tlog=true", "--allow-http-registry", *options)
        text = self.run("cosign", "verify", "--key", f"{self.key}.pub", *options, reference)
        (verified,) = (json.loads(line) for line in text.splitlines() if line.startswith("["))
        assert verified
        return sorted(
            (one["critical"]["image"]["docker-manifest-digest"] for one in verified), key=str
        )

    def verify_attestation(self, reference: str, *options: str) -> int:
        options = ("--insecure-ignore-tlog=true", "--allow-http-registry", *options)
        what = ("--type", "custom", "--key", f"{self.key}.pub")
        text = self.run("cosign", "verify-attestation", *what, *options, reference)
        return len([line for line in text.splitlines() if line.startswith("{")])

    def discover(self, reference: str) -> Any:
        """Return the tree of referrers, without the name by which the image was asked for."""
        text = self.run("oras", "discover", "--plain-http", "--format", "json", reference)
        return json.loads(re.sub(r"127\.0\.0\.1:\d+", "registry", text))


@pytest.fixture
def tools(directory: Path, pytestconfig: pytest.Config) -> Tools:
    root = pytestconfig.getoption("client_root", None)
    if not root:
        pytest.skip("Debian 12 has no cosign or ORAS: tests/newer-clients runs this with theirs")
    tools = Tools(root, directory / "tools")
    tools.directory.mkdir()
    tools.make_key()
    (tools.directory / "sbom.json").write_text('{"packages": []}')
    return tools


@pytest.fixture(params=["without the API", "with the API"])
def signing_registry(request: pytest.FixtureRequest, directory: Path) -> Iterator[AnyRegistry]:
    """A registry without the referrers API, and one with it."""
    server: AnyRegistry = ReferrersRegistry()
    if request.param == "without the API":
        server = Registry(directory / "registry")
    server.start()
    yield server
    server.stop()


def push_image(tools: Tools, registry: AnyRegistry, tag: str = "v1") -> str:
    """Push an image with oras, and return its name."""
    config = tools.directory / "config.json"
    config.write_text(json.dumps({"os": "linux", "architecture": "amd64", "tag": tag}))
    (tools.directory / f"{tag}.txt").write_text(tag)
    config_type = "application/vnd.oci.image.config.v1+json"
    layer = f"{tag}.txt:application/vnd.oci.image.layer.v1.tar"
    name = f"{registry.address}/{NAME}:{tag}"
    push = ("oras", "push", "--plain-http", "--config", f"config.json:{config_type}")
    tools.run(*push, name, layer)
    return name


def ask_in_each_situation(
    registry: AnyRegistry,
    make_daemon: Callable[..., Daemon],
    directory: Path,
    ask: Callable[[str], object],
    image: str = f"{NAME}:v1",
) -> dict[str, object]:
    """Return what `ask`, given the address of the cache, gets in the four situations."""
    answers: dict[str, object] = {}
    daemon = make_daemon(registry.url)
    answers["online"] = ask(daemon.address)
    preloaded = make_daemon(registry.url)
    preloaded.run("preload", image)
    registry.stop()
    answers["upstream down"] = ask(daemon.address)
    preloaded.run("offline", "on")
    answers["offline after preload"] = ask(preloaded.address)
    bundle = directory / "bundle.tar"
    preloaded.run("export", image, "-o", bundle)
    importing = make_daemon(registry.url)
    importing.run("import", bundle)
    answers["after export and import"] = ask(importing.address)
    registry.start()
    return answers


@pytest.mark.parametrize("form", ["bundle", "sig tag"])
def test_cosign_verifies_through_the_cache_as_directly(
    signing_registry: AnyRegistry,
    make_daemon: Callable[..., Daemon],
    directory: Path,
    tools: Tools,
    form: str,
):
    is_bundle = form == "bundle"
    if is_bundle and tools.cosign_version() < 3:
        pytest.skip("cosign 2 stores signatures under tags only, not as referrers")
    options = (
        [f"--new-bundle-format={str(is_bundle).lower()}"] if tools.cosign_version() >= 3 else []
    )
    name = push_image(tools, signing_registry)
    digest = tools.run("oras", "resolve", "--plain-http", name).strip()
    pinned = f"{name.rpartition(':')[0]}@{digest}"
    tools.sign(pinned, *options)
    tools.attest(pinned, tools.directory / "sbom.json", *options)

    def ask(address: str) -> object:
        image = f"{address}/{NAME}:v1"
        return tools.verify(image, *options), tools.verify_attestation(image, *options)

    direct = ask(signing_registry.address)
    # cosign 3 counts the attestation as well.
    assert direct in (([digest], 1), ([digest, digest], 1))
    answers = ask_in_each_situation(signing_registry, make_daemon, directory, ask)
    assert answers == dict.fromkeys(SITUATIONS, direct)


def test_oras_discovers_through_the_cache_as_directly(
    signing_registry: AnyRegistry,
    make_daemon: Callable[..., Daemon],
    directory: Path,
    tools: Tools,
):
    if not tools.has("oras"):
        pytest.skip("Debian has no ORAS package in this suite")
    name = push_image(tools, signing_registry)
    attach = ("oras", "attach", "--plain-http", "--artifact-type", "sbom/example")
    tools.run(*attach, name, "sbom.json:application/json")
    tree = tools.discover(name)
    # ORAS before 1.3 says "manifests".
    sbom = (tree.get("referrers") or tree["manifests"])[0]["digest"]
    of_sbom = f"{name.rpartition(':')[0]}@{sbom}"
    tools.run(*attach[:-1], "signature/example", of_sbom, "v1.txt:text/plain")

    def ask(address: str) -> object:
        trees = [tools.discover(f"{address}/{NAME}{one}") for one in (":v1", f"@{sbom}")]
        content = ("oras", "manifest", "fetch", "--plain-http", f"{address}/{NAME}@{sbom}")
        return *trees, tools.run(*content)

    direct = ask(signing_registry.address)
    assert "signature/example" in str(direct)
    answers = ask_in_each_situation(signing_registry, make_daemon, directory, ask)
    assert answers == dict.fromkeys(SITUATIONS, direct)


def test_an_image_without_signatures_has_none_through_the_cache_as_directly(
    signing_registry: AnyRegistry,
    make_daemon: Callable[..., Daemon],
    directory: Path,
    tools: Tools,
):
    push_image(tools, signing_registry)

    def ask(address: str) -> object:
        image = f"{address}/{NAME}:v1"
        with pytest.raises(AssertionError) as refused:
            tools.verify(image)
        discovered = tools.discover(image) if tools.has("oras") else None
        reasons = [line for line in str(refused.value).splitlines() if "rror" in line]
        return discovered, [line.replace(address, "registry") for line in reasons]

    direct = ask(signing_registry.address)
    assert "no signatures found" in str(direct)
    answers = ask_in_each_situation(signing_registry, make_daemon, directory, ask)
    assert answers == dict.fromkeys(SITUATIONS, direct)


def test_notation_verifies_through_the_cache_as_directly(
    signing_registry: AnyRegistry,
    make_daemon: Callable[..., Daemon],
    directory: Path,
    tools: Tools,
):
    if not tools.has("notation"):
        pytest.skip("Debian has no notation package in this suite")
    name = push_image(tools, signing_registry)
    digest = tools.run("oras", "resolve", "--plain-http", name).strip()
    tools.run("notation", "cert", "generate-test", "--default", "example.test")
    policy = {
        "version": "1.0",
        "trustPolicies": [
            {
                "name": "all",
                "registryScopes": ["*"],
                "signatureVerification": {"level": "strict"},
                "trustStores": ["ca:example.test"],
                "trustedIdentities": ["*"],
            }
        ],
    }
    (tools.directory / "policy.json").write_text(json.dumps(policy))
    tools.run("notation", "policy", "import", "policy.json")
    pinned = f"{name.rpartition(':')[0]}@{digest}"
    tools.run("notation", "sign", "--insecure-registry", pinned)

    def ask(address: str) -> object:
        image = f"{address}/{NAME}@{digest}"
        verified = tools.run("notation", "verify", "--insecure-registry", image)
        return verified.replace(address, "registry")

    direct = ask(signing_registry.address)
    assert "Successfully verified" in str(direct)
    answers = ask_in_each_situation(signing_registry, make_daemon, directory, ask)
    assert answers == dict.fromkeys(SITUATIONS, direct)


def test_a_database_as_trivy_publishes_it_is_pulled_from_the_offline_cache(
    signing_registry: AnyRegistry,
    make_daemon: Callable[..., Daemon],
    directory: Path,
    tools: Tools,
):
    """An artifact with media types of its own and no platform: docs/air-gap.md."""
    if not tools.has("oras"):
        pytest.skip("Debian has no ORAS package in this suite")
    database = tools.directory / "db.tar.gz"
    database.write_bytes(bytes(range(256)) * 4000)
    name, kind = "aquasecurity/trivy-db", "application/vnd.aquasec.trivy"
    push = ("oras", "push", "--plain-http", f"{signing_registry.address}/{name}:2")
    config = ("--artifact-type", f"{kind}.config.v1+json")
    tools.run(*push, *config, f"db.tar.gz:{kind}.db.layer.v1.tar+gzip")
    content = database.read_bytes()

    def ask(address: str) -> object:
        target = tools.directory / "pulled"
        tools.run("oras", "pull", "--plain-http", "-o", "pulled", f"{address}/{name}:2")
        pulled = (target / "db.tar.gz").read_bytes()
        (target / "db.tar.gz").unlink()
        return pulled == content

    daemon = make_daemon(signing_registry.url)
    assert ask(daemon.address)
    daemon.run("preload", "--pin", f"{name}:2")
    assert "2" in daemon.run("images", name)
    assert daemon.run("check-offline", f"{name}:2")
    answers = ask_in_each_situation(signing_registry, make_daemon, directory, ask, f"{name}:2")
    assert answers == dict.fromkeys(SITUATIONS, True)
