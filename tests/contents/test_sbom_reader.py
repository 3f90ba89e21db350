import base64
import json
from typing import Any

import pytest
from packageurl import PackageURL

from proxy.contents.packages import OsRelease, Package
from proxy.contents.sboms import reader as sbom_reader
from proxy.contents.sboms.reader import MAX_PURL, SbomContents, parse_sbom
from proxy.errors import ContentsError

PURL = "pkg:deb/debian/libssl3@3.0.14-1?arch=amd64&distro=debian-12&upstream=openssl%403.0.14"
LIBSSL = Package("deb", "libssl3", "3.0.14-1", "amd64", "openssl", "3.0.14", purl=PURL)


def spdx(*packages: Any) -> dict[str, Any]:
    return {"spdxVersion": "SPDX-2.3", "packages": [*packages]}


def spdx_package(
    name: str = "libssl3", version: str = "3.0.14-1", purl: str = PURL, **more: Any
) -> dict[str, Any]:
    reference = {
        "referenceCategory": "PACKAGE-MANAGER",
        "referenceType": "purl",
        "referenceLocator": purl,
    }
    refs = [{"referenceType": "cpe23Type", "referenceLocator": "cpe:x"}, reference]
    return {"name": name, "versionInfo": version, "externalRefs": refs if purl else []} | more


def parse(document: Any) -> SbomContents:
    return parse_sbom(json.dumps(document).encode())


def test_spdx_2_lists_packages_by_their_purl():
    system = {"name": "Debian", "versionInfo": "12", "primaryPackagePurpose": "OPERATING-SYSTEM"}
    image = {"name": "app", "versionInfo": "1", "primaryPackagePurpose": "CONTAINER"}
    found = parse(spdx(spdx_package(), system, image, spdx_package("a", "1", ""), {"name": "b"}, 1))
    assert found == SbomContents(
        "SPDX-2.3", [LIBSSL, Package("other", "a", "1")], OsRelease("debian", "12", "debian 12"), []
    )


@pytest.mark.parametrize(
    ("purl", "package"),
    [
        ("pkg:rpm/rhel/openssl-libs@3.0.7-27.el9?arch=x86_64&epoch=1&upstream=openssl-3.0.7-27.el9.src.rpm",
         Package("rpm", "openssl-libs", "1:3.0.7-27.el9", "x86_64", "openssl", "3.0.7-27.el9")),
        ("pkg:rpm/rhel/bash@5.1?epoch=0", Package("rpm", "bash", "5.1")),
        ("pkg:npm/%40babel/core@7.1", Package("npm", "@babel/core", "7.1")),
        ("pkg:golang/github.com/a/b@1.2", Package("other", "github.com/a/b", "1.2")),
        ("pkg:pypi/flask", Package("pypi", "flask", "3.0.14-1")),
    ],
)  # fmt: skip
def test_the_kind_of_a_package_is_in_its_purl(purl, package):
    (found,) = parse(spdx(spdx_package(purl=purl))).packages
    assert found.purl
    assert Package(*(getattr(found, name) for name in package.__struct_fields__[:-1])) == package


def test_what_stands_for_the_image_is_no_package():
    assert parse(spdx(spdx_package(purl="pkg:oci/app@sha256%3Aabc"))).packages == []
    assert parse(spdx(spdx_package(version="", purl="pkg:pypi/flask"))).packages == []


def test_an_invalid_purl_leaves_the_name():
    assert parse(spdx(spdx_package("a", "1", "nonsense"))).packages == [Package("other", "a", "1")]


def test_spdx_3_lists_packages():
    graph = [
        {"type": "software_Package", "name": "a", "software_packageVersion": "1", "software_packageUrl": PURL},
        {"type": "software_Package", "name": "b", "externalIdentifier": [
            {"externalIdentifierType": "packageUrl", "identifier": "pkg:pypi/b@2"}]},
        {"type": "software_Package", "name": "nothing"},
        {"type": "software_File", "name": "c"},
    ]  # fmt: skip
    found = parse({"@context": "https://spdx.org/rdf/3.0.1/spdx-context.jsonld", "@graph": graph})
    assert found.format == "SPDX-3"
    assert [one.name for one in found.packages] == ["libssl3", "b"]


def test_cyclonedx_lists_nested_components():
    components = [
        {"type": "library", "name": "libssl3", "version": "3.0.14-1", "purl": PURL},
        {"type": "application", "name": "x", "group": "org", "version": "1", "components": [
            {"type": "library", "name": "y", "version": "2", "purl": "pkg:pypi/y@2"}]},
        {"type": "operating-system", "name": "alpine", "version": "3.20"},
        {"type": "file", "name": "/etc/passwd", "version": "1"},
        {"type": "library", "name": "no version"},
    ]  # fmt: skip
    found = parse({"bomFormat": "CycloneDX", "specVersion": "1.6", "components": components})
    assert found.format == "CycloneDX-1.6"
    assert [one.name for one in found.packages] == ["libssl3", "y", "org/x"]
    assert found.release == OsRelease("alpine", "3.20", "alpine 3.20")
    assert parse({"bomFormat": "CycloneDX"}).format == "CycloneDX-?"


def test_components_are_read_to_a_depth():
    inner: dict[str, Any] = {"name": "x", "version": "1"}
    for _ in range(30):
        inner = {"name": "y", "version": "1", "components": [inner]}
    found = parse({"bomFormat": "CycloneDX", "components": [inner]})
    assert [one.name for one in found.packages] == ["y"]


def statement(predicate: Any, digest: str = "ab" * 32) -> dict[str, Any]:
    return {
        "_type": "https://in-toto.io/Statement/v0.1",
        "predicateType": sbom_reader.SPDX_PREDICATE,
        "subject": [{"name": "app", "digest": {"sha256": digest}}, {"digest": {"sha1": "x"}}, 1],
        "predicate": predicate,
    }


def envelope(document: Any) -> dict[str, Any]:
    payload = base64.b64encode(json.dumps(document).encode()).decode()
    return {"payloadType": "application/vnd.in-toto+json", "payload": payload, "signatures": []}


@pytest.mark.parametrize(
    "wrap",
    [
        statement,
        lambda document: envelope(statement(document)),
        lambda document: {"mediaType": "x", "dsseEnvelope": envelope(statement(document))},
        lambda document: statement({"Data": document, "Timestamp": ""}),
        lambda document: statement({"Data": json.dumps(document), "Timestamp": ""}),
    ],
    ids=["statement", "envelope", "bundle", "cosign 1", "cosign 1, text"],
)
def test_a_statement_says_what_it_is_about(wrap):
    found = parse(wrap(spdx(spdx_package())))
    assert list(found.packages) == [LIBSSL]
    assert found.subjects == ["ab" * 32]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "no JSON object"),
        (b"{}", "neither SPDX nor CycloneDX"),
        (b'{"payloadType": "x", "payload": "%"}', "damaged"),
        (b'{"dsseEnvelope": {"dsseEnvelope": {"dsseEnvelope": {"dsseEnvelope": {}}}}}', "neither"),
    ],
)
def test_what_is_no_sbom_is_said(content, reason):
    with pytest.raises(ContentsError, match=reason):
        parse_sbom(content)


def test_sizes_are_limited(monkeypatch):
    monkeypatch.setattr(sbom_reader, "MAX_SBOM_PACKAGES", 1)
    found = parse(spdx(spdx_package("a", "1", ""), spdx_package("b", "1", "")))
    assert len(found.packages) == 1
    assert "more than 1 packages" in found.problem
    monkeypatch.setattr(sbom_reader, "MAX_SBOM_SIZE", 10)
    with pytest.raises(ContentsError, match="more than 10 bytes"):
        parse(spdx())


def test_a_purl_is_kept_whole_or_not_at_all():
    long = f"pkg:generic/app@1?download_url=https%3A%2F%2Fexample.com%2F{'a' * 400}"
    (found,) = parse(spdx(spdx_package(purl=long))).packages
    assert PackageURL.from_string(found.purl) == PackageURL.from_string(long)
    too_long = f"{long}{'a' * MAX_PURL}"
    (found,) = parse(spdx(spdx_package(purl=too_long))).packages
    assert found == Package("other", "libssl3", "3.0.14-1")
    # Percent-encoded it is longer than it was.
    grown = f"pkg:generic/app@1?note={'é' * 400}"
    (found,) = parse(spdx(spdx_package(purl=grown))).packages
    assert (found.name, found.purl) == ("app", "")
