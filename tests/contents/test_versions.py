import pytest

from proxy.contents.versions import PackageQuestion, matches, parse_question
from proxy.errors import InvalidRequestError
from proxy.storage.records.contents_rows import PackageRow


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("openssl", PackageQuestion("openssl", "", "", None)),
        (" openssl < 3.0.15 ", PackageQuestion("openssl", "<", "3.0.15", None)),
        ("xz-utils>=5.6.0-0.2", PackageQuestion("xz-utils", ">=", "5.6.0-0.2", None)),
        ("rpm:vim=2:8.2", PackageQuestion("vim", "=", "2:8.2", "rpm")),
        ("@babel/core!=7", PackageQuestion("@babel/core", "!=", "7", None)),
    ],
)
def test_a_question_has_a_name_and_may_have_an_operator(text, question):
    assert parse_question(text) == question


@pytest.mark.parametrize("text", ["", "<1", "a<", "a<<1", "a<1,b", "a b", "x" * 301, "a~1 2"])
def test_what_is_no_question_is_an_error(text):
    with pytest.raises(InvalidRequestError):
        parse_question(text)


def deb(
    version: str, name: str = "openssl", source: str = "", source_version: str = ""
) -> PackageRow:
    return PackageRow(name, "deb", version, source, source_version)


@pytest.mark.parametrize(
    ("question", "package", "expected"),
    [
        ("openssl", deb("1"), True),
        ("openssl", deb("1", "libssl3", "openssl"), True),
        ("openssl", deb("1", "libssl3"), False),
        ("rpm:openssl", deb("1"), False),
        ("openssl<3.0.15", deb("3.0.14-1~deb12u2"), True),
        ("openssl<3.0.15", deb("3.0.15-1"), False),
        ("openssl<3.0.15", deb("1:3.0.1"), False),  # the epoch counts
        ("openssl<3.0.15", deb("9", "libssl3", "openssl", "3.0.14"), True),
        ("libssl3>8", deb("9", "libssl3", "openssl", "3.0.14"), True),
        ("openssl<=3.0.15-1", deb("3.0.15-1"), True),
        ("openssl=3.0.15-1", deb("3.0.15-1"), True),
        ("openssl==3.0.15-1", deb("3.0.15-1"), True),
        ("openssl!=3.0.15-1", deb("3.0.15-1"), False),
        ("openssl>3.0.15~rc1", deb("3.0.15"), True),
        ("musl<1.2.5-r1", PackageRow("musl", "apk", "1.2.5-r0", "", ""), True),
        ("musl<1.2.5-r0", PackageRow("musl", "apk", "1.2.5-r0", "", ""), False),
        ("vim<2:8.3", PackageRow("vim", "rpm", "2:8.2-1.el9", "", ""), True),
        ("Flask<3.1", PackageRow("flask", "pypi", "3.0.1", "", ""), True),
        ("flask<3.1", PackageRow("flask", "pypi", "3.1rc1", "", ""), True),
        ("lodash<4.17.21", PackageRow("lodash", "npm", "4.17.20", "", ""), True),
        ("lodash<4.17.21", PackageRow("lodash", "npm", "nonsense", "", ""), None),
        ("flask<x", PackageRow("flask", "pypi", "3.0", "", ""), None),
        ("a<1", PackageRow("a", "other", "0", "", ""), None),
        ("a=1", PackageRow("a", "other", "1", "", ""), True),
        ("a!=1", PackageRow("a", "other", "1", "", ""), False),
    ],
)
def test_versions_are_ordered_as_their_package_manager_orders_them(question, package, expected):
    assert matches(parse_question(question), package) is expected


def test_python_names_are_looked_for_as_they_are_kept():
    assert parse_question("Foo_Bar").names == ["Foo_Bar", "foo-bar"]
    assert parse_question("foo").names == ["foo"]
