import struct

import pytest

from proxy.contents.layers.rpm import parse_rpm_header, split_source_rpm
from proxy.contents.packages import Package
from tests.support.layers import make_rpm_header

OPENSSL: dict[int, str | int] = {
    1000: "openssl-libs", 1001: "3.0.7", 1002: "27.el9", 1003: 1, 1022: "x86_64",
    1044: "openssl-3.0.7-27.el9.src.rpm", 1004: "summary",
}  # fmt: skip


def test_a_header_names_the_package_its_epoch_and_its_source():
    found = parse_rpm_header(make_rpm_header(OPENSSL), "p")
    assert found == Package("rpm", "openssl-libs", "1:3.0.7-27.el9", "x86_64", "openssl", path="p")
    found = parse_rpm_header(make_rpm_header(OPENSSL | {1044: "openssl-3-1.src.rpm"}), "p")
    assert found
    assert found.source_version == "3-1"


def test_without_epoch_the_source_has_the_same_version():
    found = parse_rpm_header(make_rpm_header(OPENSSL | {1003: 0}), "p")
    assert found == Package("rpm", "openssl-libs", "3.0.7-27.el9", "x86_64", "openssl", "", "p")
    assert parse_rpm_header(make_rpm_header({1000: "x", 1001: "1"}), "p") == Package(
        "rpm", "x", "1", path="p"
    )


def test_keys_of_signatures_are_no_packages():
    assert parse_rpm_header(make_rpm_header({1000: "gpg-pubkey", 1001: "1"}), "p") is None


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\0" * 7,
        struct.pack(">II", 1 << 31, 1 << 31),
        struct.pack(">II", 2, 100) + b"\0" * 40,
        struct.pack(">IIIIII", 1, 4, 1000, 6, 99, 1) + b"x\0\0\0",  # points beyond its data
        struct.pack(">IIIIII", 1, 2, 1003, 4, 0, 1) + b"xx",
        struct.pack(">IIIIII", 1, 4, 1000, 4, 0, 1) + b"xxxx",
    ],
)
def test_a_damaged_header_has_no_package(blob):
    assert parse_rpm_header(blob, "p") is None


def test_the_source_package_is_in_the_name_of_its_file():
    assert split_source_rpm("a-b-1.0-2.el9.src.rpm") == ("a-b", "1.0-2.el9")
    assert split_source_rpm("(none)") == ("", "")
