"""Package URLs (purl-spec). Pure."""

from collections.abc import Mapping

import msgspec
from packageurl import PackageURL

from proxy.contents.packages import OsRelease, Package


def with_purl(package: Package, release: OsRelease) -> Package:
    """Return the package with its package URL, unless it has one."""
    if package.purl:
        return package
    namespace, name, version = None, package.name, package.version
    qualifiers: dict[str, str] = {}
    if package.kind in ("deb", "apk", "rpm"):
        namespace = release.id or {"deb": "debian", "apk": "alpine"}.get(package.kind)
        distribution = "-".join(filter(None, (release.id, release.version)))
        epoch, colon, rest = version.partition(":")
        if package.kind == "rpm" and colon:
            qualifiers["epoch"], version = epoch, rest
        qualifiers |= {"arch": package.architecture, "distro": distribution}
        source = package.source
        if source and package.kind == "deb" and package.source_version:
            source += f"@{package.source_version}"
        qualifiers["upstream"] = source
    elif package.kind == "npm" and name.startswith("@") and "/" in name:
        namespace, _, name = name.partition("/")
    kind = "generic" if package.kind == "other" else package.kind
    return msgspec.structs.replace(
        package, purl=_to_purl(kind, namespace, name, version, qualifiers)
    )


def _to_purl(
    kind: str, namespace: str | None, name: str, version: str, qualifiers: Mapping[str, str]
) -> str:
    given = {key: value for key, value in qualifiers.items() if value}
    try:
        return PackageURL(kind, namespace, name, version or None, given or None).to_string()
    except (TypeError, ValueError):  # a name that no package manager would accept
        return ""
