"""SBOMs are valid by the libraries of their projects."""

import json
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from spdx_tools.spdx.parser.parse_anything import parse_file
from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document

from proxy.contents.image_contents import NOT_READ, ImageContents
from proxy.contents.packages import OsRelease, Package
from proxy.contents.purls import with_purl
from proxy.contents.sboms.reader import parse_sbom
from proxy.contents.sboms.writer import SbomSubject, write_cyclonedx, write_spdx

DEBIAN = OsRelease("debian", "12", "Debian GNU/Linux 12")
SUBJECT = SbomSubject(
    "ghcr.io/me/app:v1", "sha256:" + "ab" * 32, "linux/amd64", "2026-11-30T12:00:00Z", "1.0"
)
PACKAGES = [
    with_purl(one, DEBIAN)
    for one in (
        Package(
            "deb", "libssl3", "3.0.14-1~deb12u2", "amd64", "openssl", path="var/lib/dpkg/status"
        ),
        Package("npm", "@babel/core", "7.1.0", path="app/node_modules/@babel/core/package.json"),
    )
]
FULL = ImageContents(
    source="layers", read=1, release=DEBIAN, packages=PACKAGES, problems=["x"], unread=NOT_READ
)
NOTHING = ImageContents(source="none", read=1)
NO_PURL = ImageContents(
    source="layers", read=1, release=OsRelease("arch"), packages=[Package("other", "a", "1")]
)


@pytest.mark.parametrize("contents", [FULL, NOTHING, NO_PURL], ids=["full", "nothing", "no purl"])
def test_cyclonedx_is_valid(contents):
    text = json.dumps(write_cyclonedx(SUBJECT, contents))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


@pytest.mark.parametrize("contents", [FULL, NOTHING, NO_PURL], ids=["full", "nothing", "no purl"])
def test_spdx_is_valid(contents, tmp_path: Path):
    path = tmp_path / "image.spdx.json"
    path.write_text(json.dumps(write_spdx(SUBJECT, contents)), encoding="utf-8")
    assert validate_full_spdx_document(parse_file(str(path))) == []


@pytest.mark.parametrize("write", [write_cyclonedx, write_spdx])
def test_what_is_written_is_read_again(write):
    found = parse_sbom(json.dumps(write(SUBJECT, FULL)).encode())
    assert [(one.name, one.version, one.source, one.purl) for one in found.packages] == [
        (one.name, one.version, one.source, one.purl) for one in PACKAGES
    ]
    assert found.release.id == "debian"


def test_the_same_content_has_the_same_identity():
    assert write_cyclonedx(SUBJECT, FULL) == write_cyclonedx(SUBJECT, FULL)
    other = SUBJECT._replace(digest="sha256:" + "cd" * 32)
    assert (
        write_spdx(SUBJECT, FULL)["documentNamespace"]
        != write_spdx(other, FULL)["documentNamespace"]
    )
