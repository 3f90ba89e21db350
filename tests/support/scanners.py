"""Reports as trivy 0.57 and grype 0.85 print them, shortened, and a scanner that prints a file."""

import json
import sys
from pathlib import Path
from typing import Any

TRIVY: dict[str, Any] = {
    "SchemaVersion": 2,
    "CreatedAt": "2026-11-30T06:12:33.402107Z",
    "ArtifactName": "127.0.0.1:5000/docker.io/library/app@sha256:abc",
    "ArtifactType": "container_image",
    "Metadata": {"OS": {"Family": "debian", "Name": "12.8"}, "ImageID": "sha256:abc"},
    "Results": [
        {
            "Target": "app (debian 12.8)",
            "Class": "os-pkgs",
            "Type": "debian",
            "Vulnerabilities": [
                {
                    "VulnerabilityID": "CVE-2024-5535",
                    "PkgID": "libssl3@3.0.14-1~deb12u2",
                    "PkgName": "libssl3",
                    "PkgIdentifier": {"PURL": "pkg:deb/debian/libssl3@3.0.14-1~deb12u2"},
                    "InstalledVersion": "3.0.14-1~deb12u2",
                    "FixedVersion": "3.0.15-1~deb12u1",
                    "Status": "fixed",
                    "SeveritySource": "nvd",
                    "PrimaryURL": "https://avd.aquasec.com/nvd/cve-2024-5535",
                    "Title": "openssl: SSL_select_next_proto buffer overread",
                    "Severity": "CRITICAL",
                },
                {
                    "VulnerabilityID": "CVE-2011-3389",
                    "PkgName": "libgnutls30",
                    "InstalledVersion": "3.7.9-2+deb12u3",
                    "Status": "affected",
                    "Severity": "LOW",
                    "Description": "The SSL protocol encrypts data with CBC mode",
                },
            ],
        },
        {"Target": "Python", "Class": "lang-pkgs", "Type": "python-pkg"},
    ],
}

GRYPE: dict[str, Any] = {
    "matches": [
        {
            "vulnerability": {
                "id": "CVE-2024-5535",
                "dataSource": "https://security-tracker.debian.org/tracker/CVE-2024-5535",
                "namespace": "debian:distro:debian:12",
                "severity": "Critical",
                "urls": [],
                "description": "Calling SSL_select_next_proto with an empty list",
                "fix": {"versions": ["3.0.15-1~deb12u1"], "state": "fixed"},
            },
            "relatedVulnerabilities": [],
            "matchDetails": [{"type": "exact-indirect-match", "matcher": "dpkg-matcher"}],
            "artifact": {"name": "libssl3", "version": "3.0.14-1~deb12u2", "type": "deb"},
        },
        {
            "vulnerability": {
                "id": "GHSA-m2qf-hxjv-5gpq",
                "severity": "Negligible",
                "fix": {"versions": [], "state": "unknown"},
            },
            "artifact": {"name": "Flask", "version": "2.3.1", "type": "python"},
        },
    ],
    "source": {"type": "image", "target": {"userInput": "app"}},
    "distro": {"name": "debian", "version": "12"},
    "descriptor": {
        "name": "grype",
        "version": "0.85.0",
        "timestamp": "2026-11-30T06:12:33Z",
        "db": {"built": "2026-11-29T01:31:45Z", "schemaVersion": 5, "location": "/root/.cache"},
    },
}

CYCLONEDX: dict[str, Any] = {
    "bomFormat": "CycloneDX",
    "specVersion": "1.6",
    "metadata": {"tools": {"components": [{"name": "trivy", "version": "0.57.0"}]}},
    "components": [{"bom-ref": "a", "type": "library", "name": "zlib1g", "version": "1:1.2.13"}],
    "vulnerabilities": [
        {
            "id": "CVE-2023-45853",
            "ratings": [{"severity": "medium"}, {"severity": "critical"}],
            "description": "MiniZip in zlib through 1.3 has an integer overflow",
            "recommendation": "Upgrade zlib1g",
            "affects": [{"ref": "a"}, {"ref": "b"}],
        },
        {"id": "CVE-0000-0000", "affects": [{"ref": "a"}]},
    ],
}


def make_scanner(directory: Path, report: object, *, code: str = "", status: int = 0) -> list[str]:
    """Return the command of a scanner that prints `report` after it has run `code`.

    `code` sees `image`, the URL of the manifest of its image in the cache.
    """
    path, script = directory / "report.json", directory / "scanner.py"
    path.write_text(json.dumps(report) if isinstance(report, dict) else str(report))
    script.write_text(
        "import os, sys, time, urllib.request\n"
        "address, _, rest = sys.argv[1].partition('/')\n"
        "name, _, digest = rest.partition('@')\n"
        "image = f'http://{address}/v2/{name}/manifests/{digest}'\n"
        f"{code}\nsys.stdout.write(open({str(path)!r}).read())\nsys.exit({status})\n"
    )
    return [sys.executable, str(script), "{image}", "{cache}"]
