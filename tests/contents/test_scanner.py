"""The operator's own scanner, as a script."""

import asyncio
import gzip
import json
from typing import Any

import pytest

from proxy.contents import scanner as scanner_module
from proxy.contents.scanner import loopback_address
from proxy.errors import ConfigError, ContentsError, InvalidRequestError
from tests.fakes.content import OCI_CONFIG, OCI_MANIFEST, descriptor
from tests.support.admin_api import APP, call, pull_parts
from tests.support.commands import run_on
from tests.support.openapi import validate
from tests.support.preload_api import run_preload
from tests.support.program import Program
from tests.support.sboms import DEBIAN, PYTHON, pull_whole
from tests.support.scanners import CYCLONEDX, GRYPE, TRIVY, make_scanner

GET_IMAGE = "assert urllib.request.urlopen(image).status == 200"


@pytest.fixture
async def scanned(registry, program, tmp_path):
    """`app:latest`, and a function that sets the scanner."""
    image = registry.add_image(APP, layers=[DEBIAN])
    await pull_whole(program, image)

    async def configure(report: object, **options: Any) -> str:
        keys = {"scanner_timeout", "scan_every"}.intersection(options)
        settings = {key: options.pop(key) for key in keys}
        command = make_scanner(tmp_path, report, **options)
        assert await program.reload(contents={"scanner": command, **settings})
        return str(image.digest)

    return configure


async def scan(program: Program, image: str = "app") -> Any:
    found = await call(program, "post", "/api/v1/images/scan", {"image": image})
    validate(found, "FindingsAnswer")
    return found


async def last(program: Program, image: str = "app") -> Any:
    found = await call(program, "get", "/api/v1/images/findings", image=image)
    validate(found, "FindingsAnswer")
    return found


@pytest.mark.parametrize("report", [TRIVY, GRYPE, CYCLONEDX], ids=["trivy", "grype", "cyclonedx"])
async def test_it_finds_the_image_in_this_cache_by_its_digest(program, scanned, report):
    digest = await scanned(report, code=f"{GET_IMAGE}\nassert sys.argv[2] == address")
    assert (await last(program))["report"] is None
    found = await scan(program)
    assert found["digest"] == digest
    assert found["counts"]["critical"] >= 1
    assert found["report"]["found"]["findings"][0]["severity"] == "critical"
    assert await last(program) == found
    await program.restart()
    assert await last(program) == found


async def test_findings_are_printed_with_the_fixed_version(program, scanned):
    await scanned(GRYPE)
    done = await run_on(program, "scan", "app")
    assert done.exit_code == 0
    head, table = done.stdout.split("\n\n")
    assert "2026-11-29T01:31:45Z" in head
    assert "1 critical, 1 negligible" in head
    header, first, _ = (line.split() for line in table.splitlines())
    assert header[:4] == ["ID", "SEVERITY", "PACKAGE", "INSTALLED"]
    assert first[:5] == [
        "CVE-2024-5535", "critical", "libssl3", "3.0.14-1~deb12u2", "3.0.15-1~deb12u1",
    ]  # fmt: skip
    done = await run_on(program, "scan", "app", "--last", "--format", "csv")
    assert done.stdout.splitlines()[1].startswith("CVE-2024-5535,critical,libssl3,")
    done = await run_on(program, "scan", "app", "--last", "--format", "json")
    assert json.loads(done.stdout)["report"]["found"]["scanner"] == "grype 0.85.0"


async def test_without_findings_or_a_scan_that_is_said(program, scanned):
    await scanned({"ArtifactName": "x"})
    done = await run_on(program, "scan", "app", "--last")
    assert done.exit_code == 1
    assert "was not scanned yet" in done.stderr
    done = await run_on(program, "scan", "app")
    assert "none" in done.stdout
    assert "the scanner does not say" in done.stdout


async def test_without_a_scanner_the_key_is_named(registry, program):
    await pull_whole(program, registry.add_image(APP, layers=[DEBIAN]))
    with pytest.raises(InvalidRequestError, match=r"contents\.scanner"):
        await scan(program)


@pytest.mark.parametrize(
    ("report", "options", "reason"),
    [
        (TRIVY, {"code": "sys.exit('FATAL no database')"}, "status 1 and no report: FATAL no database"),
        ("{nonsense", {}, "not JSON"),
        ("{}", {}, "neither trivy's, nor grype's"),
        (TRIVY, {"code": "time.sleep(60)", "scanner_timeout": "1s"}, "took too long"),
        ("x" * 3000, {"code": ""}, "no report"),
    ],
    ids=["fails", "no JSON", "no report", "hangs", "text"],
)  # fmt: skip
async def test_a_scanner_that_fails_is_told(program, scanned, report, options, reason):
    await scanned(report, **options)
    with pytest.raises(ContentsError, match=reason):
        await scan(program)
    assert (await last(program))["report"] is None


async def test_a_report_of_too_many_bytes_is_refused(program, scanned, monkeypatch):
    monkeypatch.setattr(scanner_module, "MAX_REPORT_SIZE", 1000)
    await scanned("{" + "x" * 100_000)
    with pytest.raises(ContentsError, match="printed more than 1000 bytes"):
        await scan(program)


async def test_the_status_of_a_scanner_does_not_count_if_it_reports(program, scanned):
    await scanned(TRIVY, status=5)
    assert (await scan(program))["counts"] == {"critical": 1, "low": 1}


async def test_a_scanner_that_cannot_be_run_is_told(program, scanned):
    await scanned(TRIVY)
    await program.reload(contents={"scanner": ["/nonexistent", "{image}"]})
    with pytest.raises(ContentsError, match="/nonexistent cannot be run"):
        await scan(program)


async def test_settings_of_the_daemon_are_kept_from_it(program, scanned, monkeypatch):
    monkeypatch.setenv("PULLCACHE_SECRET", "x")
    await scanned(TRIVY, code="assert not [x for x in os.environ if x.startswith('PULLCACHE')]")
    await scan(program)


async def test_one_runs_at_a_time(program, scanned, tmp_path):
    lock = tmp_path / "lock"
    code = (
        f"os.close(os.open({str(lock)!r}, os.O_CREAT | os.O_EXCL)); time.sleep(0.2)\n"
        f"os.unlink({str(lock)!r})"
    )
    await scanned(TRIVY, code=code)
    await asyncio.gather(*(scan(program) for _ in range(3)))


async def test_an_image_without_all_layers_is_not_scanned(registry, program, scanned):
    await scanned(TRIVY)
    registry.add_image("me/other", layers=[PYTHON])
    await pull_parts(program, "me/other", "latest")
    with pytest.raises(ContentsError, match="1 of 1 layers are not in the store"):
        await scan(program, "me/other")


async def test_all_images_are_scanned_at_an_interval(registry, program, scanned, monkeypatch):
    monkeypatch.setattr(scanner_module, "SCHEDULE_INTERVAL", 0.05)
    await program.restart()
    await pull_whole(program, registry.add_image("me/other", layers=[PYTHON]))
    await scanned(TRIVY, code=GET_IMAGE, scan_every="1h")
    program.clock.advance(3700)
    async with asyncio.timeout(30):
        for image in ("app", "me/other"):
            while (await last(program, image))["report"] is None:  # noqa: ASYNC110 (no event)
                await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ({"scanner": ["trivy"]}, "names no image"),
        ({"scan_every": "1d"}, "needs a scanner"),
    ],
)
async def test_a_configuration_that_cannot_work_is_refused(program, contents, reason):
    program.sections["contents"] = contents
    with pytest.raises(ConfigError, match=reason):
        program.config()


@pytest.mark.parametrize(
    ("addresses", "address"),
    [
        (["0.0.0.0:5000"], "127.0.0.1:5000"),
        (["[::]:5000"], "[::1]:5000"),
        (["192.0.2.1:5000", "0.0.0.0:1"], "192.0.2.1:5000"),
        (["socket", "127.0.0.1:5"], "127.0.0.1:5"),
    ],
)
def test_the_address_of_the_cache_is_one_that_this_machine_reaches(addresses, address):
    assert loopback_address(addresses) == address


def test_without_an_address_there_is_nothing_to_scan():
    with pytest.raises(ContentsError, match="start pullcache serve"):
        loopback_address([])


async def test_data_of_trivy_is_an_artifact_like_any_other(registry, program):
    """`[[preload]] images = ["ghcr.io/aquasecurity/trivy-db:2"]` brings the data."""
    data = gzip.compress(b"trivy.db" * 1000)
    config = b"{}"
    for blob in (data, config):
        registry.add_blob(blob, "aquasecurity/trivy-db")
    layer = descriptor(data, "application/vnd.aquasec.trivy.db.layer.v1.tar+gzip")
    layer["annotations"] = {"org.opencontainers.image.title": "db.tar.gz"}
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": "application/vnd.aquasec.trivy.config.v1+json",
        "config": descriptor(config, OCI_CONFIG),
        "layers": [layer],
    }
    content = json.dumps(document).encode()
    registry.add_manifest("aquasecurity/trivy-db", "2", content, OCI_MANIFEST)
    await run_preload(program, "aquasecurity/trivy-db:2")
    registry.requests.clear()
    answer = await program.manifest("aquasecurity/trivy-db", "2")
    assert answer.body == content
    assert (await program.blob(layer["digest"], "aquasecurity/trivy-db")).body == data
    found = await call(program, "get", "/api/v1/images/contents", image="aquasecurity/trivy-db:2")
    assert found["contents"]["source"] == "none"
