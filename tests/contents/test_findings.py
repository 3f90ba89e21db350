import json
from typing import Any

import pytest

from proxy.contents import findings
from proxy.contents.findings import (
    ScanFindings,
    Vulnerability,
    count_severities,
    parse_report,
    write_csv,
)
from proxy.errors import ContentsError
from tests.support.scanners import CYCLONEDX, GRYPE, TRIVY


def parse(document: Any) -> ScanFindings:
    return parse_report(json.dumps(document).encode())


def test_trivys_findings_have_the_fixed_version():
    assert parse(TRIVY) == ScanFindings(
        "trivy",
        [
            Vulnerability(
                "CVE-2024-5535", "critical", "libssl3", "3.0.14-1~deb12u2", "3.0.15-1~deb12u1",
                "openssl: SSL_select_next_proto buffer overread",
            ),
            Vulnerability(
                "CVE-2011-3389", "low", "libgnutls30", "3.7.9-2+deb12u3", "",
                "The SSL protocol encrypts data with CBC mode",
            ),
        ],
    )  # fmt: skip


@pytest.mark.parametrize(
    "database", [{"built": "2026-11-29"}, {"status": {"built": "2026-11-29"}}], ids=["5", "6"]
)
def test_grypes_findings_have_the_date_of_its_data(database):
    found = parse(GRYPE | {"descriptor": GRYPE["descriptor"] | {"db": database}})
    assert (found.scanner, found.data_from) == ("grype 0.85.0", "2026-11-29")
    assert found.findings == [
        Vulnerability(
            "CVE-2024-5535", "critical", "libssl3", "3.0.14-1~deb12u2", "3.0.15-1~deb12u1",
            "Calling SSL_select_next_proto with an empty list",
        ),
        Vulnerability("GHSA-m2qf-hxjv-5gpq", "negligible", "Flask", "2.3.1"),
    ]  # fmt: skip


def test_cyclonedx_has_the_worst_rating():
    found = parse(CYCLONEDX)
    assert found.scanner == "trivy 0.57.0"
    assert [(one.id, one.severity, one.package, one.installed) for one in found.findings] == [
        ("CVE-2023-45853", "critical", "b", ""),
        ("CVE-2023-45853", "critical", "zlib1g", "1:1.2.13"),
        ("CVE-0000-0000", "unknown", "zlib1g", "1:1.2.13"),
    ]
    old = CYCLONEDX | {"metadata": {"tools": [{"name": "x"}]}}
    assert parse(old).scanner == "x"
    assert parse({"bomFormat": "CycloneDX"}) == ScanFindings("CycloneDX", [])


def test_a_report_without_findings_is_one():
    assert parse({"SchemaVersion": 2, "ArtifactName": "x"}) == ScanFindings("trivy", [])
    assert parse({"matches": []}) == ScanFindings("grype", [])


@pytest.mark.parametrize(
    "document",
    [
        {"Results": 1},
        {"Results": [1, {"Vulnerabilities": 1}, {"Vulnerabilities": [1, {}]}]},
        {"matches": [1, {}, {"vulnerability": 1, "artifact": []}], "descriptor": 1},
        {"bomFormat": "CycloneDX", "vulnerabilities": [{"id": 1, "affects": [{}]}]},
    ],
)
def test_drift_leaves_findings_out(document):
    assert parse(document).findings == []


def test_odd_severities_are_unknown():
    one = {"VulnerabilityID": "x", "PkgName": "y", "Severity": 5}
    two = one | {"Severity": "NONE"}
    found = parse({"Results": [{"Vulnerabilities": [one, two]}]})
    assert [finding.severity for finding in found.findings] == ["negligible", "unknown"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "not JSON"), (b"[]", "no JSON object"), (b"{}", "neither"), (b"[" * 99999, "not JSON")],
)
def test_what_is_no_report_is_said(content, reason):
    with pytest.raises(ContentsError, match=reason):
        parse_report(content)


def test_sizes_are_limited(monkeypatch):
    monkeypatch.setattr(findings, "MAX_FINDINGS", 1)
    found = parse(TRIVY)
    assert [one.id for one in found.findings] == ["CVE-2024-5535"]
    assert found.problem == "of 2 findings only 1 are kept"
    monkeypatch.setattr(findings, "MAX_REPORT_SIZE", 10)
    with pytest.raises(ContentsError, match="more than 10 bytes"):
        parse(TRIVY)


def test_csv_has_a_header_and_no_formulas():
    text = write_csv([Vulnerability("CVE-1", "low", "=cmd", "1", "2", 'a "b", c')])
    assert text.splitlines() == [
        "id,severity,package,installed,fixed,title",
        'CVE-1,low,\'=cmd,1,2,"a ""b"", c"',
    ]


def test_findings_are_counted_by_severity():
    assert count_severities(parse(TRIVY).findings) == {"critical": 1, "low": 1}
