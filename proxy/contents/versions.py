"""Questions about packages, `openssl<3.0.15`, and the order of versions of each kind of package."""

import re
from collections.abc import Callable, Mapping
from functools import cache
from operator import eq, ge, gt, le, lt, ne
from typing import Any, NamedTuple, cast

from proxy.contents.layers.databases import normalize_python_name
from proxy.contents.packages import PackageKind
from proxy.errors import InvalidRequestError
from proxy.storage.records.contents_rows import PackageRow

MAX_QUESTION_LENGTH = 300

_QUESTION = re.compile(
    r"(?:(?P<kind>deb|apk|rpm|pypi|npm):)?(?P<name>[^\s<>=!,]+)"
    r"(?:\s*(?P<operator><=|>=|!=|==|=|<|>)\s*(?P<version>[^\s<>=!,]+))?"
)
_OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": lt, "<=": le, "=": eq, "==": eq, ">=": ge, ">": gt, "!=": ne,
}  # fmt: skip


class PackageQuestion(NamedTuple):
    """Which packages of a name, of any kind or of one, have such a version.

    Without an operator, all of that name.
    """

    name: str
    operator: str
    version: str
    kind: PackageKind | None

    @property
    def names(self) -> list[str]:
        """The names to look for: as it is, and as Python's packages are kept."""
        return list(dict.fromkeys((self.name, normalize_python_name(self.name))))


def parse_question(text: str) -> PackageQuestion:
    """Parse a question. Raises `InvalidRequestError`."""
    match = _QUESTION.fullmatch(text.strip()) if len(text) <= MAX_QUESTION_LENGTH else None
    if match is None:
        raise InvalidRequestError(
            f"{text[:60]!r} is no question about a package: write NAME, or NAME<VERSION with one of"
            " < <= = >= > !="
        )
    fields = match.groupdict(default="")
    kind = cast("PackageKind | None", fields["kind"] or None)
    return PackageQuestion(fields["name"], fields["operator"], fields["version"], kind)


def matches(question: PackageQuestion, package: PackageRow) -> bool | None:
    """Tell whether a package is one that is asked for; None if its version cannot be compared.

    The version of a package that was built from a source of that name is the source's.
    """
    if question.kind and package.kind != question.kind:
        return False
    is_named = package.name == question.name or (
        package.kind == "pypi" and package.name == normalize_python_name(question.name)
    )
    if not is_named and package.source != question.name:
        return False
    if not question.operator:
        return True
    version = package.version if is_named else package.source_version or package.version
    return _compare(package.kind, version, question.operator, question.version)


def _compare(kind: str, version: str, operator: str, wanted: str) -> bool | None:
    compare = _OPERATORS[operator]
    version_class = _version_classes().get(kind)
    if version_class is None:
        # No order is known.
        return compare(version, wanted) if operator in ("=", "==", "!=") else None
    try:
        return bool(compare(version_class(version), version_class(wanted)))
    except Exception:  # noqa: BLE001 (versions are strangers' texts, and each class has its own errors)
        return None


@cache
def _version_classes() -> Mapping[str, Callable[[str], Any]]:
    # Importing them takes 80 ms.
    from univers.versions import (  # noqa: PLC0415
        AlpineLinuxVersion,
        DebianVersion,
        PypiVersion,
        RpmVersion,
        SemverVersion,
    )

    return {
        "deb": DebianVersion,
        "apk": AlpineLinuxVersion,
        "rpm": RpmVersion,
        "pypi": PypiVersion,
        "npm": SemverVersion,
    }
