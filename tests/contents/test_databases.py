from proxy.contents.layers.databases import (
    normalize_python_name,
    parse_apk_installed,
    parse_dpkg_status,
    parse_node_package,
    parse_python_metadata,
)
from proxy.contents.packages import Package
from tests.support.layers import APK_INSTALLED, DPKG_STATUS


def test_dpkg_lists_what_is_installed_with_its_source():
    assert parse_dpkg_status(DPKG_STATUS, "p") == [
        Package("deb", "openssl", "3.0.14-1~deb12u2", "amd64", path="p"),
        Package("deb", "libssl3", "3.0.14-1~deb12u2", "amd64", "openssl", path="p"),
        Package("deb", "libc-bin", "2.36-9+deb12u8", "amd64", "glibc", "2.36-9", "p"),
    ]


def test_a_file_of_distroless_has_no_status():
    found = parse_dpkg_status(b"Package: base-files\nVersion: 12.4\nSource: base-files\n\n\n", "p")
    assert found == [Package("deb", "base-files", "12.4", path="p")]
    assert parse_dpkg_status(b"Package: base-files\nVersion: 12.4", "p") == found


def test_what_is_no_database_of_dpkg_has_no_packages():
    for content in (b"", b"\xff\x00\n\n:\n", b"Package:\nVersion: 1\n", b"Status: \n"):
        assert parse_dpkg_status(content, "p") == []


def test_apk_lists_packages_with_their_origin():
    assert parse_apk_installed(APK_INSTALLED, "p") == [
        Package("apk", "libssl3", "3.3.2-r1", "x86_64", "openssl", path="p"),
        Package("apk", "musl", "1.2.5-r0", "x86_64", path="p"),
    ]
    assert parse_apk_installed(b"P:x\n\nV:1\n\n", "p") == []


def test_python_metadata_is_read_up_to_the_description():
    content = b"Metadata-Version: 2.1\nName: Foo.Bar_baz\nVersion: 1.2\n\nName: other\nVersion: 3\n"
    assert parse_python_metadata(content, "p") == [Package("pypi", "foo-bar-baz", "1.2", path="p")]
    assert parse_python_metadata(b"Name: x\n", "p") == []
    assert normalize_python_name("A--b") == "a-b"


def test_node_packages_have_a_name_and_a_version():
    content = b'{"name": "@babel/core", "version": "7.1.0", "dependencies": {}}'
    assert parse_node_package(content, "p") == [Package("npm", "@babel/core", "7.1.0", path="p")]
    for wrong in (
        b"",
        b"[]",
        b'{"name": "x"}',
        b'{"name": "x", "version": 1}',
        b"[" * 9999,
        b"\xff",
    ):
        assert parse_node_package(wrong, "p") == []
    assert parse_node_package(b'{"name": "x", "version": ""}', "p") == []
