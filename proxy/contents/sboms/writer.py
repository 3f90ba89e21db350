"""Writes what is in an image as an SBOM: CycloneDX 1.6 or SPDX 2.3, as JSON. Pure."""

import uuid
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from proxy.contents.image_contents import ImageContents
from proxy.contents.packages import Package

SbomFormat = Literal["cyclonedx", "spdx"]

_NOT_STATED = "NOASSERTION"


class SbomSubject(NamedTuple):
    """What an SBOM is about: an image by name, digest and platform. `made` is ISO 8601 in UTC."""

    image: str
    digest: str
    platform: str
    made: str
    tool_version: str


def write_cyclonedx(subject: SbomSubject, contents: ImageContents) -> dict[str, Any]:
    """Return a CycloneDX document."""
    release = contents.release
    system = {
        "type": "operating-system",
        "bom-ref": "operating-system",
        "name": release.id,
        **({"version": release.version} if release.version else {}),
        **({"description": release.name} if release.name else {}),
    }
    notes = [*contents.problems, *([contents.unread] if contents.unread else [])]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{_identity(subject)}",
        "version": 1,
        "metadata": {
            "timestamp": subject.made,
            "tools": {
                "components": [
                    {"type": "application", "name": "pullcache", "version": subject.tool_version}
                ]
            },
            "component": {
                "type": "container",
                "bom-ref": subject.digest,
                "name": subject.image,
                "version": subject.digest,
            },
            "properties": [
                {"name": "pullcache:platform", "value": subject.platform},
                {"name": "pullcache:source", "value": contents.source},
                *({"name": "pullcache:not-read", "value": one} for one in notes),
            ],
        },
        "components": [
            *([system] if release.id else []),
            *(_component(number, one) for number, one in enumerate(contents.packages)),
        ],
    }


def _component(number: int, package: Package) -> dict[str, Any]:
    properties = [
        {"name": f"pullcache:{name}", "value": value}
        for name, value in (("path", package.path), ("source", package.source))
        if value
    ]
    return {
        "type": "library",
        "bom-ref": f"package-{number}",
        "name": package.name,
        "version": package.version,
        **({"purl": package.purl} if package.purl else {}),
        **({"properties": properties} if properties else {}),
    }


def write_spdx(subject: SbomSubject, contents: ImageContents) -> dict[str, Any]:
    """Return an SPDX document."""
    image = "SPDXRef-Image"
    packages = [
        {
            "SPDXID": image,
            "name": subject.image,
            "versionInfo": subject.digest,
            "downloadLocation": _NOT_STATED,
            "filesAnalyzed": False,
            "primaryPackagePurpose": "CONTAINER",
        }
    ]
    if contents.release.id:
        packages.append(
            {
                "SPDXID": "SPDXRef-OperatingSystem",
                "name": contents.release.id,
                "versionInfo": contents.release.version or _NOT_STATED,
                "downloadLocation": _NOT_STATED,
                "filesAnalyzed": False,
                "primaryPackagePurpose": "OPERATING-SYSTEM",
            }
        )
    packages += _spdx_packages(contents)
    return {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": subject.image,
        "documentNamespace": f"urn:uuid:{_identity(subject)}",
        "comment": " ".join(filter(None, (*contents.problems, contents.unread))),
        "creationInfo": {
            "created": subject.made,
            "creators": [f"Tool: pullcache-{subject.tool_version}"],
        },
        "packages": packages,
        "relationships": [
            _relationship("SPDXRef-DOCUMENT", "DESCRIBES", image),
            *(_relationship(image, "CONTAINS", str(one["SPDXID"])) for one in packages[1:]),
        ],
    }


def _spdx_packages(contents: ImageContents) -> Iterator[dict[str, Any]]:
    for number, one in enumerate(contents.packages):
        reference = {
            "referenceCategory": "PACKAGE-MANAGER",
            "referenceType": "purl",
            "referenceLocator": one.purl,
        }
        yield {
            "SPDXID": f"SPDXRef-Package-{number}",
            "name": one.name,
            "versionInfo": one.version,
            "downloadLocation": _NOT_STATED,
            "filesAnalyzed": False,
            **({"sourceInfo": f"found in {one.path}"} if one.path else {}),
            **({"externalRefs": [reference]} if one.purl else {}),
        }


def _relationship(element: str, kind: str, related: str) -> dict[str, str]:
    return {
        "spdxElementId": element,
        "relationshipType": kind,
        "relatedSpdxElement": related,
    }


def _identity(subject: SbomSubject) -> uuid.UUID:
    return uuid.uuid5(uuid.NAMESPACE_URL, f"{subject.image}@{subject.digest}/{subject.made}")


WRITERS: dict[SbomFormat, Callable[[SbomSubject, ImageContents], dict[str, Any]]] = {
    "cyclonedx": write_cyclonedx,
    "spdx": write_spdx,
}
