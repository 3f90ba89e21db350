"""What scanners report: trivy's JSON, grype's JSON, and the vulnerabilities of CycloneDX. Pure.

trivy: aquasecurity.github.io/trivy, "Reporting". grype: its `presenter/models/document.go`. CycloneDX: 1.4 and later.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, get_args

import msgspec

from proxy.contents.packages import clean_text
from proxy.errors import ContentsError

# Findings that are kept of one report, and bytes of a report.
MAX_FINDINGS = 20_000
MAX_REPORT_SIZE = 64 << 20

Severity = Literal["critical", "high", "medium", "low", "negligible", "unknown"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)


class Vulnerability(msgspec.Struct, frozen=True, omit_defaults=True):
    """A vulnerability of a package; `fixed` is the version that repairs it, if there is one."""

    id: str
    severity: Severity
    package: str
    installed: str
    fixed: str = ""
    title: str = ""


class ScanFindings(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a scanner found. `data_from` is the date of its data as it states it, empty if it does not."""

    scanner: str
    findings: Sequence[Vulnerability]
    data_from: str = ""
    problem: str = ""


def parse_report(content: bytes) -> ScanFindings:
    """Parse a report. Raises `ContentsError`."""
    if len(content) > MAX_REPORT_SIZE:
        raise ContentsError(f"the report has more than {MAX_REPORT_SIZE} bytes")
    try:
        document = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ContentsError(f"the report is not JSON: {str(error)[:80]}") from error
    if not isinstance(document, dict):
        raise ContentsError("the report is no JSON object")
    if document.get("bomFormat") == "CycloneDX":
        scanner, data_from, found = _read_cyclonedx(document)
    elif "matches" in document:
        scanner, data_from, found = _read_grype(document)
    elif "Results" in document or "ArtifactName" in document:
        scanner, data_from, found = "trivy", "", _iter_trivy(document)
    else:
        raise ContentsError("the report is neither trivy's, nor grype's, nor CycloneDX")
    distinct = dict.fromkeys(one for one in found if one.id and one.package)
    findings = sorted(
        distinct, key=lambda one: (SEVERITIES.index(one.severity), one.id, one.package)
    )
    problem = ""
    if len(findings) > MAX_FINDINGS:
        problem = f"of {len(findings)} findings only {MAX_FINDINGS} are kept"
    return ScanFindings(scanner, findings[:MAX_FINDINGS], data_from, problem)


def _iter_trivy(document: dict[str, Any]) -> Iterator[Vulnerability]:
    for result in _objects(document.get("Results")):
        for one in _objects(result.get("Vulnerabilities")):
            yield Vulnerability(
                _text(one.get("VulnerabilityID")),
                _severity(one.get("Severity")),
                _text(one.get("PkgName")),
                _text(one.get("InstalledVersion")),
                _text(one.get("FixedVersion")),
                _text(one.get("Title")) or _text(one.get("Description")),
            )


def _read_grype(document: dict[str, Any]) -> tuple[str, str, Iterator[Vulnerability]]:
    descriptor = _object(document.get("descriptor"))
    database = _object(descriptor.get("db"))
    built = _object(database.get("status")).get("built") or database.get("built")
    name = " ".join(filter(None, (_text(descriptor.get("name")), _text(descriptor.get("version")))))
    return name or "grype", _text(built), _iter_grype(document)


def _iter_grype(document: dict[str, Any]) -> Iterator[Vulnerability]:
    for match in _objects(document.get("matches")):
        vulnerability, artifact = (
            _object(match.get("vulnerability")),
            _object(match.get("artifact")),
        )
        versions = _object(vulnerability.get("fix")).get("versions")
        yield Vulnerability(
            _text(vulnerability.get("id")),
            _severity(vulnerability.get("severity")),
            _text(artifact.get("name")),
            _text(artifact.get("version")),
            ", ".join(map(_text, islice(versions, 5))) if isinstance(versions, list) else "",
            _text(vulnerability.get("description")),
        )


def _read_cyclonedx(document: dict[str, Any]) -> tuple[str, str, Iterator[Vulnerability]]:
    tools = _object(document.get("metadata")).get("tools")
    listed = tools if isinstance(tools, list) else _object(tools).get("components")
    names = [
        " ".join(filter(None, (_text(one.get("name")), _text(one.get("version")))))
        for one in _objects(listed)
    ]
    return names[0] if names else "CycloneDX", "", _iter_cyclonedx(document)


def _iter_cyclonedx(document: dict[str, Any]) -> Iterator[Vulnerability]:
    components = {
        str(one.get("bom-ref")): (_text(one.get("name")), _text(one.get("version")))
        for one in _objects(document.get("components"))
    }
    for one in _objects(document.get("vulnerabilities")):
        ratings = [_severity(rating.get("severity")) for rating in _objects(one.get("ratings"))]
        severity: Severity = min(ratings, key=SEVERITIES.index) if ratings else "unknown"
        for affected in _objects(one.get("affects")):
            name, version = components.get(str(affected.get("ref")), ("", ""))
            yield Vulnerability(
                _text(one.get("id")),
                severity,
                name or _text(affected.get("ref")),
                version,
                _text(one.get("recommendation")),
                _text(one.get("description")),
            )


def write_csv(findings: Iterable[Vulnerability]) -> str:
    """Return findings as CSV (RFC 4180) with a header. A formula of a spreadsheet is quoted as text."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(("id", "severity", "package", "installed", "fixed", "title"))
    for one in findings:
        row = (one.id, one.severity, one.package, one.installed, one.fixed, one.title)
        writer.writerow(
            [f"'{text}" if text.startswith(("=", "+", "-", "@")) else text for text in row]
        )
    return buffer.getvalue()


def count_severities(findings: Iterable[Vulnerability]) -> dict[str, int]:
    """Return how many findings each severity has, the worst first."""
    counts = Counter(one.severity for one in findings)
    return {name: counts[name] for name in SEVERITIES if counts[name]}


_SEVERITY_NAMES: dict[str, Severity] = {
    **{name: name for name in SEVERITIES},
    "info": "negligible",
    "none": "negligible",
}


def _severity(value: object) -> Severity:
    return _SEVERITY_NAMES.get(value.lower(), "unknown") if isinstance(value, str) else "unknown"


def _objects(value: object) -> Iterator[dict[str, Any]]:
    if isinstance(value, list):
        yield from (one for one in value if isinstance(one, dict))


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return clean_text(value) if isinstance(value, str) else ""
