import pytest

from proxy.contents.layers import layer_contents
from proxy.contents.layers.layer_contents import (
    FoundFile,
    LayerContents,
    classify,
    merge_layers,
    read_whiteout,
)
from proxy.contents.packages import OsRelease, Package
from tests.support.layers import DPKG_STATUS, OS_RELEASE, read_files

SITE = "usr/lib/python3/dist-packages"
METADATA = b"Name: flask\nVersion: 3.0\n"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("var/lib/dpkg/status", "dpkg"),
        ("var/lib/dpkg/status.d/base", "dpkg"),
        ("var/lib/dpkg/status.d/base.md5sums", None),
        ("var/lib/dpkg/status-old", None),
        ("x/var/lib/dpkg/status", None),
        ("usr/lib/apk/db/installed", "apk"),
        ("usr/lib/sysimage/rpm/rpmdb.sqlite", "rpm"),
        ("var/lib/rpm/Packages", "old rpm"),
        (f"{SITE}/flask-3.0.dist-info/METADATA", "python"),
        ("flask.egg-info/PKG-INFO", "python"),
        ("opt/flask-3.0.egg-info", "python"),
        ("opt/flask.egg/EGG-INFO/PKG-INFO", "python"),
        ("opt/METADATA", None),
        ("app/node_modules/@babel/core/package.json", "node"),
        ("app/node_modules/x/node_modules/y/package.json", "node"),
        ("app/node_modules/x/test/package.json", None),
        ("app/package.json", None),
        ("etc/os-release", "os-release"),
        ("etc/passwd", None),
    ],
)
def test_files_that_name_packages_are_told_by_their_path(path, kind):
    assert classify(path) == kind


def test_whiteouts_hide_a_path_or_what_was_in_a_directory():
    assert read_whiteout("a/.wh.b") == ("a/b", False)
    assert read_whiteout(".wh.b") == ("b", False)
    assert read_whiteout("a/.wh..wh..opq") == ("a", True)
    assert read_whiteout(".wh..wh..opq") == ("", True)
    assert read_whiteout(".wh..wh.plnk") is None
    assert read_whiteout("a/.wh.") is None
    assert read_whiteout("a.wh.b") is None


def names(*layers: LayerContents) -> list[str]:
    return [one.name for one in merge_layers(layers).packages]


def test_a_later_layer_replaces_the_database_of_an_earlier_one():
    upgraded = DPKG_STATUS.replace(b"3.0.14-1~deb12u2", b"3.0.15-1")
    merged = merge_layers(
        [
            read_files({"var/lib/dpkg/status": DPKG_STATUS, "etc/os-release": OS_RELEASE}),
            read_files({"./var/lib/dpkg/status": upgraded}),
        ]
    )
    assert {one.version for one in merged.packages} == {"3.0.15-1", "2.36-9+deb12u8"}
    assert merged.release.id == "debian"
    assert "distro=debian-12" in merged.packages[0].purl


@pytest.mark.parametrize(
    ("upper", "left"),
    [
        ({f"{SITE}/.wh.flask-3.0.dist-info": b""}, []),
        ({f"{SITE}/flask-3.0.dist-info/.wh.METADATA": b""}, []),
        ({"usr/.wh.lib": b""}, []),
        ({".wh..wh..opq": b""}, []),
        ({f"{SITE}/.wh..wh..opq": b""}, []),
        ({f"{SITE}/flask-3.0.dist-info/.wh.RECORD": b""}, ["flask"]),
        ({"opt/.wh..wh..opq": b""}, ["flask"]),
        ({f"{SITE}/.wh.flask": b""}, ["flask"]),
    ],
)
def test_what_a_later_layer_removes_is_not_there(upper, left):
    lower = read_files({f"{SITE}/flask-3.0.dist-info/METADATA": METADATA})
    assert names(lower, read_files(upper)) == left


def test_a_whiteout_leaves_what_is_in_its_own_layer():
    lower = read_files({f"{SITE}/a-1.dist-info/METADATA": b"Name: a\nVersion: 1\n"})
    upper = read_files(
        {f"{SITE}/flask-3.0.dist-info/METADATA": METADATA, f"{SITE}/.wh..wh..opq": b""}
    )
    assert names(lower, upper) == ["flask"]


def test_problems_name_the_layer_or_the_file():
    broken = LayerContents([FoundFile("x", problem="broken")], problem="truncated")
    merged = merge_layers([LayerContents(), broken])
    assert merged.problems == ["layer 2: truncated", "x: broken"]
    assert merged.release == OsRelease()


def test_packages_beyond_the_limit_are_counted(monkeypatch):
    monkeypatch.setattr(layer_contents, "MAX_IMAGE_PACKAGES", 1)
    found = FoundFile("x", [Package("pypi", "a", "1"), Package("pypi", "b", "1")])
    merged = merge_layers([LayerContents([found])])
    assert len(merged.packages) == 1
    assert merged.problems == ["of 2 packages only 1 are listed"]
