"""SBOMs that are attached to an image: SPDX and CycloneDX as JSON, also in in-toto statements. Pure.

Statements are in envelopes (DSSE) or Sigstore bundles. Signatures are not verified here.
"""

import base64
import binascii
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from packageurl import PackageURL

from proxy.contents.layers.rpm import split_source_rpm
from proxy.contents.packages import OsRelease, Package, PackageKind, clean_text, sort_packages
from proxy.errors import ContentsError

# Bytes of an SBOM: syft's of an image of 800 packages has 10 MB, because it names files.
MAX_SBOM_SIZE = 32 << 20
MAX_SBOM_PACKAGES = 100_000
# Characters of a package URL; a longer one is ignored, because no part of it is valid.
MAX_PURL = 1000
# Components of CycloneDX may contain components.
MAX_COMPONENT_DEPTH = 16

SPDX_PREDICATE = "https://spdx.dev/Document"
CYCLONEDX_PREDICATE = "https://cyclonedx.org/bom"

_KINDS: dict[str, PackageKind] = {
    "deb": "deb",
    "apk": "apk",
    "rpm": "rpm",
    "pypi": "pypi",
    "npm": "npm",
}
# What stands for the image itself, or for its files.
_NOT_PACKAGES = frozenset({"oci", "docker"})
_ENVELOPE_DEPTH = 4


class SbomContents(msgspec.Struct, frozen=True, omit_defaults=True):
    """The packages that an SBOM lists; `format` is `SPDX-2.3`, `CycloneDX-1.6` or the like.

    `subjects` are the SHA-256 digests, in hex, of what its statement is about; none without a statement.
    """

    format: str
    packages: Sequence[Package]
    release: OsRelease = OsRelease()
    subjects: Sequence[str] = ()
    problem: str = ""


def parse_sbom(content: bytes) -> SbomContents:
    """Parse an SBOM, whatever it is wrapped in. Raises `ContentsError`."""
    if len(content) > MAX_SBOM_SIZE:
        raise ContentsError(f"the SBOM has more than {MAX_SBOM_SIZE} bytes")
    document = _decode(content)
    subjects: list[str] = []
    for _ in range(_ENVELOPE_DEPTH):
        inner = _unwrap(document, subjects)
        if inner is None:
            break
        document = inner
    read = _find_reader(document)
    packages: list[Package] = []
    release = OsRelease()
    problem = ""
    for one in read(document):
        if isinstance(one, OsRelease):
            release = one
        elif len(packages) < MAX_SBOM_PACKAGES:
            packages.append(one)
        else:
            problem = f"the SBOM has more than {MAX_SBOM_PACKAGES} packages"
    form = _format(document)
    return SbomContents(form, sort_packages(packages), release, subjects, problem)


def _decode(content: bytes) -> dict[str, Any]:
    try:
        document = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ContentsError(f"the SBOM is not JSON: {str(error)[:80]}") from error
    if not isinstance(document, dict):
        raise ContentsError("the SBOM is no JSON object")
    return document


def _unwrap(document: dict[str, Any], subjects: list[str]) -> dict[str, Any] | None:
    """Return what is in a bundle, an envelope or a statement, whose subjects are noted; None for others."""
    if isinstance(envelope := document.get("dsseEnvelope"), dict):
        return envelope
    if isinstance(payload := document.get("payload"), str) and "payloadType" in document:
        try:
            return _decode(base64.b64decode(payload, validate=True))
        except binascii.Error as error:
            raise ContentsError("the envelope of the SBOM is damaged") from error
    if isinstance(predicate := document.get("predicate"), dict) and "predicateType" in document:
        for subject in _objects(document.get("subject")):
            digests = subject.get("digest")
            if isinstance(digests, dict) and isinstance(hexadecimal := digests.get("sha256"), str):
                subjects.append(hexadecimal[:64])
        data = predicate.get("Data")  # cosign before 2.0
        if isinstance(data, str):
            return _decode(data.encode())
        return data if isinstance(data, dict) else predicate
    return None


def _find_reader(document: dict[str, Any]) -> Any:
    if isinstance(document.get("spdxVersion"), str):
        return _read_spdx_2
    if "spdx.org/rdf/3" in str(document.get("@context"))[:200]:
        return _read_spdx_3
    if document.get("bomFormat") == "CycloneDX":
        return _read_cyclonedx
    raise ContentsError("it is neither SPDX nor CycloneDX")


def _format(document: dict[str, Any]) -> str:
    if document.get("bomFormat") == "CycloneDX":
        return clean_text(f"CycloneDX-{document.get('specVersion', '?')}")
    return clean_text(str(document.get("spdxVersion", "SPDX-3")))


def _read_spdx_2(document: dict[str, Any]) -> Iterator[Package | OsRelease]:
    for item in _objects(document.get("packages")):
        purls = [
            _text(reference.get("referenceLocator"))
            for reference in _objects(item.get("externalRefs"))
            if reference.get("referenceType") == "purl"
        ]
        purpose = _text(item.get("primaryPackagePurpose"))
        if purpose == "OPERATING-SYSTEM":
            yield _release(item.get("name"), item.get("versionInfo"))
        elif purpose not in ("CONTAINER", "FILE") and (
            package := _to_package(item.get("name"), item.get("versionInfo"), purls)
        ):
            yield package


def _read_spdx_3(document: dict[str, Any]) -> Iterator[Package]:
    for item in _objects(document.get("@graph")):
        if item.get("type") != "software_Package":
            continue
        purls = [_text(item.get("software_packageUrl"))]
        purls += [
            _text(one.get("identifier"))
            for one in _objects(item.get("externalIdentifier"))
            if _text(one.get("externalIdentifierType")).lower() == "packageurl"
        ]
        package = _to_package(item.get("name"), item.get("software_packageVersion"), purls)
        if package:
            yield package


def _read_cyclonedx(document: dict[str, Any]) -> Iterator[Package | OsRelease]:
    waiting = [(one, MAX_COMPONENT_DEPTH) for one in _objects(document.get("components"))]
    for item, depth in waiting:  # grows during the iteration
        if depth:
            waiting += [(one, depth - 1) for one in _objects(item.get("components"))]
        kind = _text(item.get("type"))
        if kind == "operating-system":
            yield _release(item.get("name"), item.get("version"))
        elif kind not in ("file", "container"):
            name = "/".join(filter(None, (_text(item.get("group")), _text(item.get("name")))))
            package = _to_package(name, item.get("version"), [_text(item.get("purl"))])
            if package:
                yield package


def _release(name: object, version: object) -> OsRelease:
    identity, number = clean_text(_text(name)).lower(), clean_text(_text(version))
    return OsRelease(identity, number, " ".join(filter(None, (identity, number))))


def _to_package(name: object, version: object, purls: Sequence[str]) -> Package | None:
    """Return the package by its first valid purl, or by its name; None for the image itself."""
    for text in filter(None, purls):
        if len(text) > MAX_PURL:
            continue
        try:
            purl = PackageURL.from_string(text)
        except ValueError:
            continue
        return None if purl.type in _NOT_PACKAGES else _from_purl(purl, version)
    plain = clean_text(_text(name))
    stated = clean_text(_text(version))
    return Package("other", plain, stated) if plain and stated else None


def _from_purl(purl: PackageURL, version: object) -> Package | None:
    kind = _KINDS.get(purl.type, "other")
    qualifiers = dict(purl.qualifiers)
    number = clean_text(purl.version or _text(version))
    if kind == "rpm" and (epoch := _text(qualifiers.get("epoch"))) not in ("", "0"):
        number = f"{clean_text(epoch)}:{number}"
    name = purl.name
    if purl.namespace and kind in ("npm", "other"):
        name = f"{purl.namespace}/{name}"
    source, _, source_version = clean_text(_text(qualifiers.get("upstream"))).partition("@")
    if kind == "rpm":
        source, source_version = split_source_rpm(source)
    name = clean_text(name)
    url = purl.to_string()
    return (
        Package(
            kind,
            name,
            number,
            clean_text(_text(qualifiers.get("arch"))),
            "" if source == name else source,
            source_version,
            purl=url if len(url) <= MAX_PURL else "",
        )
        if name and number
        else None
    )


def _objects(value: object) -> Iterator[dict[str, Any]]:
    if isinstance(value, list):
        yield from (one for one in value if isinstance(one, dict))


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
