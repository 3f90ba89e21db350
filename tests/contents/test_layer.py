"""Reading of layers, hostile ones included."""

import gzip
import io
import random
import struct
import tarfile
import zlib

import pytest

from proxy.contents.layers import archive, layer
from proxy.contents.layers.layer import read_layer, read_rpm_database
from proxy.contents.layers.layer_contents import LayerContents
from proxy.contents.packages import OsRelease
from tests.support.layers import (
    APK_INSTALLED,
    DPKG_STATUS,
    compress_zstd,
    link_to,
    make_layer,
    make_rpm_database,
    make_rpm_header,
    make_tar,
    read_files,
)

STATUS = "var/lib/dpkg/status"


def read(content: bytes) -> LayerContents:
    return read_layer(io.BytesIO(content))


def found(contents: LayerContents) -> dict[str, list[str]]:
    return {one.path: [package.name for package in one.packages] for one in contents.files}


FILES: dict[str, bytes | tarfile.TarInfo | None] = {
    "var": None,
    "big": b"x" * 700_000,
    STATUS: DPKG_STATUS,
    "lib/apk/db/installed": APK_INSTALLED,
}


@pytest.mark.parametrize(
    "compress",
    [
        bytes,
        gzip.compress,
        compress_zstd,
        lambda content: gzip.compress(content[:5000]) + gzip.compress(content[5000:]) + b"\0" * 50,
        lambda content: compress_zstd(content[:5000]) + compress_zstd(content[5000:]),
    ],
    ids=["plain", "gzip", "zstd", "two gzip streams", "two zstd streams"],
)
def test_a_layer_is_read_whatever_compresses_it(compress):
    contents = read(compress(make_tar(FILES)))
    assert contents.problem == ""
    assert contents.entries == 4
    assert found(contents) == {
        STATUS: ["openssl", "libssl3", "libc-bin"],
        "lib/apk/db/installed": ["libssl3", "musl"],
    }


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_are_read(form):
    path = f"{'d' * 90}/{'e' * 150}/a.dist-info/METADATA"
    contents = read(make_tar({path: b"Name: a\nVersion: 1\n"}, form))
    assert found(contents) == {path: ["a"]}


def test_a_name_in_two_fields_is_read():
    path = f"{'d' * 90}/a.dist-info/METADATA"
    contents = read(make_tar({path: b"Name: a\nVersion: 1\n"}, tarfile.USTAR_FORMAT))
    assert found(contents) == {path: ["a"]}


def test_an_empty_layer_has_nothing():
    assert read(b"").problem == ""
    assert read(make_layer({})).entries == 0


@pytest.mark.parametrize("name", ["/var/lib/dpkg/status", "./var//lib/./dpkg/status"])
def test_names_are_below_the_root(name):
    assert found(read_files({name: DPKG_STATUS})) == {STATUS: ["openssl", "libssl3", "libc-bin"]}


@pytest.mark.parametrize(
    "name", ["../var/lib/dpkg/status", "var/../var/lib/dpkg/status", "..", ".", "/"]
)
def test_names_that_lead_elsewhere_are_left_out(name):
    contents = read_files({name: DPKG_STATUS, "etc/os-release": b"ID=x"})
    assert [one.path for one in contents.files] == ["etc/os-release"]


def test_a_hard_link_to_a_file_of_the_layer_is_that_file():
    first, second = "a/node_modules/x/package.json", "b/node_modules/x/package.json"
    contents = read_files(
        {
            first: b'{"name": "x", "version": "1"}',
            second: link_to(first, is_hard=True),
            "c/node_modules/x/package.json": link_to("elsewhere", is_hard=True),
        }
    )
    assert found(contents) == {first: ["x"], second: ["x"]}
    assert contents.files[1].packages[0].path == second


def test_a_database_that_is_a_link_is_said_not_to_be_read():
    contents = read_files({STATUS: link_to("/etc/shadow"), "var/lib/dpkg/status.d/x": None})
    assert contents.files[0].problem == "it is a link or a sparse file, which is not read"
    assert contents.removed == [STATUS]


def test_a_later_entry_of_a_path_replaces_the_earlier_one():
    twice = make_tar({STATUS: DPKG_STATUS})[:-10240] + make_tar({STATUS: b""})
    first = make_tar({STATUS: DPKG_STATUS})
    end = 512 + -(-len(DPKG_STATUS) // 512) * 512
    twice = first[:end] + make_tar({STATUS: b""})
    assert found(read(twice)) == {STATUS: []}


def test_archives_of_java_are_counted():
    assert read_files({"app.jar": b"x", "b.war": b"", "c.txt": b""}).archives == 2


def test_of_the_metadata_of_python_the_head_is_enough():
    content = b"Name: a\nVersion: 1\n\n" + b"x" * 300_000
    assert found(read_files({"a.egg-info": content, STATUS: DPKG_STATUS}))["a.egg-info"] == ["a"]


# Damage and attacks.


@pytest.mark.parametrize("compress", [bytes, gzip.compress, compress_zstd])
def test_of_a_truncated_layer_the_beginning_is_read(compress):
    noise = random.Random(0).randbytes(600_000)
    content = compress(make_tar({STATUS: DPKG_STATUS, "noise": noise}))
    contents = read(content[: len(content) // 2])
    assert "truncated" in contents.problem
    assert STATUS in found(contents)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\x1f\x8b" + b"x" * 100, "damaged"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 100, "damaged"),
        (b"x" * 2000, "no tar archive"),
        (b"x" * 100, "truncated"),
    ],
)
def test_what_is_no_archive_is_said_to_be_damaged(content, problem):
    assert problem in read(content).problem


@pytest.mark.parametrize("compress", [gzip.compress, compress_zstd])
def test_a_bomb_ends_at_its_ratio(monkeypatch, compress):
    monkeypatch.setattr(archive, "MIN_RATIO_SIZE", 1 << 20)
    monkeypatch.setattr(archive, "MAX_LAYER_RATIO", 100)
    content = compress(make_tar({"zeros": bytes(64 << 20)}))
    assert "grows more than 100 times" in read(content).problem


def test_a_layer_ends_at_its_size(monkeypatch):
    monkeypatch.setattr(archive, "MAX_LAYER_SIZE", 1 << 20)
    assert "more than 1048576 bytes" in read(make_layer({"zeros": bytes(2 << 20)})).problem


@pytest.mark.parametrize("compress", [gzip.compress, compress_zstd])
def test_streams_are_counted(monkeypatch, compress):
    monkeypatch.setattr(archive, "MAX_LAYER_STREAMS", 10)
    assert "more than 10 streams" in read(compress(b"") * 11).problem


def test_entries_are_counted(monkeypatch):
    monkeypatch.setattr(archive, "MAX_LAYER_ENTRIES", 100)
    contents = read_files({f"f{number}": b"" for number in range(200)})
    assert contents.problem == "the layer has more than 100 entries"
    assert contents.entries == 100


def test_packages_are_counted(monkeypatch):
    monkeypatch.setattr(layer, "MAX_LAYER_PACKAGES", 1)
    contents = read_files({STATUS: DPKG_STATUS})
    assert contents.problem == "the layer has more than 1 packages"


def test_whiteouts_are_counted(monkeypatch):
    monkeypatch.setattr(layer, "MAX_WHITEOUTS", 10)
    contents = read_files({f".wh.f{number}": b"" for number in range(20)})
    assert contents.problem == "the layer removes more than 10 files"


def test_a_huge_extended_header_ends_the_reading():
    entry = tarfile.TarInfo("a")
    entry.pax_headers = {"comment": "x" * (2 << 20)}
    assert "an extended header of" in read_files({"a": entry}).problem


@pytest.mark.parametrize(
    "record", [b"", b"x", b"99 path=a\n", b"0 path=a\n", b"9 path=ab", b"1 path=abc\n"]
)
def test_a_damaged_extended_header_ends_the_reading(record):
    block = tarfile.TarInfo("x")
    block.type, block.size = tarfile.XHDTYPE, len(record)
    content = block.tobuf() + record.ljust(512, b"\0") + make_tar({STATUS: DPKG_STATUS})
    assert ("damaged extended header" in read(content).problem) == bool(record)


@pytest.mark.parametrize("size", ["-1", "x", "9" * 30])
def test_an_invalid_size_in_an_extended_header_ends_the_reading(size):
    entry = tarfile.TarInfo(STATUS)
    entry.pax_headers = {"size": size}
    content = entry.tobuf(tarfile.PAX_FORMAT)
    assert "invalid size" in read(content).problem


@pytest.mark.parametrize(
    ("field", "problem"),
    [
        (b"\xff" * 12, "invalid size"),
        (b"\x80" + b"\x7f" * 11, "invalid size"),
        (b"99999999999\0", "invalid header"),
        (b"-0000000001\0", "invalid header"),
        (b"0_000000001\0", "invalid header"),
    ],
)
def test_an_invalid_size_in_a_header_ends_the_reading(field, problem):
    block = bytearray(tarfile.TarInfo(STATUS).tobuf())
    block[124:136] = field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    assert problem in read(bytes(block)).problem


def test_a_size_in_binary_is_read():
    block = bytearray(tarfile.TarInfo(STATUS).tobuf())
    block[124:136] = b"\x80" + len(DPKG_STATUS).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    assert found(read(bytes(block) + DPKG_STATUS.ljust(1024, b"\0")))


def test_a_size_of_many_bytes_does_not_take_them():
    entry = tarfile.TarInfo(STATUS)
    entry.size = 60 << 30
    content = entry.tobuf(tarfile.GNU_FORMAT) + b"x" * 5000
    contents = read(content)
    assert "truncated" in contents.problem
    assert "more than 67108864, and was not read" in contents.files[0].problem


def test_a_sparse_file_is_not_read():
    entry = tarfile.TarInfo(STATUS)
    entry.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    contents = read_files({STATUS: entry, "etc/os-release": b"ID=x"})
    assert "sparse" in contents.files[0].problem
    assert contents.files[1].release == OsRelease("x")


def test_a_sparse_file_in_the_old_format_is_skipped():
    block = bytearray(tarfile.TarInfo(STATUS).tobuf(tarfile.GNU_FORMAT))
    block[156:157], block[482] = b"S", 1
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    maps = bytes(504) + b"\1" + bytes(7) + bytes(512)
    contents = read(bytes(block) + maps + make_tar({"etc/os-release": b"ID=x"}))
    assert "sparse" in contents.files[0].problem
    assert contents.files[1].release == OsRelease("x")


def test_global_headers_are_skipped():
    content = make_tar({STATUS: DPKG_STATUS})
    entry = tarfile.TarInfo("g")
    entry.type, entry.size = tarfile.XGLTYPE, 20
    head = entry.tobuf() + b"20 comment=x\n".ljust(512, b"\0")
    assert found(read(head + content))


def test_a_package_json_of_many_bytes_is_not_read():
    path = "node_modules/x/package.json"
    content = b'{"name": "x", "version": "1", "x": "' + b"x" * (1 << 20) + b'"}'
    assert "was not read" in read_files({path: content}).files[0].problem


@pytest.mark.parametrize("seed", range(20))
def test_mutated_layers_end_with_a_result(seed):
    chance = random.Random(seed)
    database = make_rpm_database(make_rpm_header({1000: "a", 1001: "1"}))
    files = FILES | {"var/lib/rpm/rpmdb.sqlite": database, "x/.wh.y": b"", "l": link_to("big")}
    content = bytearray(make_tar({name: data for name, data in files.items() if name != "big"}))
    for _ in range(chance.randint(1, 40)):
        content[chance.randrange(len(content))] = chance.randrange(256)
    data = bytes(content[: chance.randint(1, len(content))])
    for compressed in (data, gzip.compress(data), zlib.compress(data), compress_zstd(data)):
        read(compressed)


# The database of rpm.


def test_the_database_of_rpm_is_read():
    database = make_rpm_database(
        make_rpm_header({1000: "bash", 1001: "5.1", 1002: "9.el9"}), b"damaged"
    )
    contents = read_files({"var/lib/rpm/rpmdb.sqlite": database})
    assert found(contents) == {"var/lib/rpm/rpmdb.sqlite": ["bash"]}
    assert contents.files[0].problem == ""


@pytest.mark.parametrize("name", ["Packages", "Packages.db"])
def test_a_database_of_an_old_kind_is_said_not_to_be_read(name):
    contents = read_files({f"var/lib/rpm/{name}": b"x"})
    assert "an rpm database of an old kind" in contents.files[0].problem


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"SQLite format 3\0",
        b"SQLite format 3\0" + b"\xff" * 9000,
        make_rpm_database()[:3000],
        make_rpm_database(schema="CREATE TABLE other (blob)"),
        make_rpm_database(schema="CREATE VIEW Packages AS SELECT 1 AS blob"),
        make_rpm_database(schema="CREATE TABLE Packages (hnum)"),
        # Each row would take seconds, in one step.
        make_rpm_database(
            schema="CREATE TABLE Packages (hnum INTEGER PRIMARY KEY, blob AS (hex(zeroblob(9))));"
            "INSERT INTO Packages (hnum) VALUES (1)"
        ),
    ],
)
def test_a_damaged_database_of_rpm_has_a_problem(content):
    packages, problem = read_rpm_database(content, "p")
    assert packages == []
    assert problem.startswith("the rpm database is damaged or not supported")


def test_rows_that_are_no_headers_are_counted():
    assert read_rpm_database(make_rpm_database("text"), "p") == (
        [],
        "1 rows of the rpm database are damaged",
    )


def test_a_query_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr(layer, "MAX_SQLITE_STEPS", 0)
    header = make_rpm_header({1000: "a", 1001: "1"})
    database = make_rpm_database(*[header] * 50_000)
    packages, problem = read_rpm_database(database, "p")
    assert "interrupted" in problem
    assert len(packages) < 50_000


def test_a_row_of_many_bytes_is_not_read():
    rows = make_rpm_database(struct.pack(">II", 0, 17 << 20) + bytes(17 << 20))
    assert "too big" in read_rpm_database(rows, "p")[1]
