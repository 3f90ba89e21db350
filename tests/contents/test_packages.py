import pytest

from proxy.contents.packages import (
    OsRelease,
    Package,
    clean_text,
    parse_os_release,
    sort_packages,
)
from proxy.contents.purls import with_purl
from tests.support.layers import OS_RELEASE

DEBIAN = OsRelease("debian", "12", "Debian GNU/Linux 12 (bookworm)")


def test_os_release_names_the_distribution():
    assert parse_os_release(OS_RELEASE) == DEBIAN
    assert parse_os_release(b"NAME='Wolfi'\nID=wolfi") == OsRelease("wolfi", "", "Wolfi")
    assert parse_os_release(b"\xff\n=\n") == OsRelease()


@pytest.mark.parametrize(
    ("package", "release", "purl"),
    [
        (
            Package("deb", "libssl3", "3.0.14-1~deb12u2", "amd64", "openssl"),
            DEBIAN,
            "pkg:deb/debian/libssl3@3.0.14-1~deb12u2?arch=amd64&distro=debian-12&upstream=openssl",
        ),
        (
            Package("deb", "libc-bin", "2.36-9+b1", "amd64", "glibc", "2.36-9"),
            OsRelease(),
            "pkg:deb/debian/libc-bin@2.36-9%2Bb1?arch=amd64&upstream=glibc%402.36-9",
        ),
        (Package("apk", "musl", "1.2.5-r0"), OsRelease(), "pkg:apk/alpine/musl@1.2.5-r0"),
        (
            Package("rpm", "vim", "2:8.2-1.el9", "x86_64"),
            OsRelease("rhel", "9.4"),
            "pkg:rpm/rhel/vim@8.2-1.el9?arch=x86_64&distro=rhel-9.4&epoch=2",
        ),
        (Package("rpm", "vim", "8.2"), OsRelease(), "pkg:rpm/vim@8.2"),
        (Package("pypi", "flask", "3.0"), DEBIAN, "pkg:pypi/flask@3.0"),
        (Package("npm", "@babel/core", "7.1"), DEBIAN, "pkg:npm/%40babel/core@7.1"),
        (Package("npm", "@babel", "7.1"), DEBIAN, "pkg:npm/%40babel@7.1"),
        (Package("other", "x", "1"), DEBIAN, "pkg:generic/x@1"),
        (Package("other", "x", "1", purl="pkg:golang/x@1"), DEBIAN, "pkg:golang/x@1"),
        (Package("deb", "/", "1"), DEBIAN, ""),
    ],
)
def test_a_package_has_a_purl(package, release, purl):
    assert with_purl(package, release).purl == purl


def test_texts_are_one_printable_line():
    assert clean_text(" a\x00b\u202ec\x1b[31m" + "x" * 999)[:10] == "a\ufffdb\ufffdc\ufffd[31m"
    assert len(clean_text("x" * 999)) == 300


def test_packages_are_sorted_without_duplicates():
    a, b = Package("npm", "a", "1"), Package("deb", "b", "1")
    assert sort_packages([a, b, a]) == [b, a]
