"""`pullcache export` and `pullcache import` on stores that no daemon runs on."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from backports import zstd
from click.testing import CliRunner, Result

from proxy.cli import main
from tests.fakes.content import digest_of
from tests.support.bundles import (
    APP_FULL_NAME,
    LayoutBuilder,
    blob_digests,
    blob_path,
    build_layout,
    make_tar,
    unpack_tar,
)

RUNNER = CliRunner()


def run(store: Path, command: str, *arguments: str | Path, stdin: bytes = b"") -> Result:
    argv = [command, "--store", str(store), *map(str, arguments)]
    result = RUNNER.invoke(main, argv, input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with two versions of an image, the second one layer more."""
    made = LayoutBuilder()
    common = os.urandom(300_000)
    made.list_image(made.add_manifest(common), name=f"{APP_FULL_NAME}:1")
    made.list_image(made.add_manifest(common, b"more"), name=f"{APP_FULL_NAME}:2")
    (tmp_path / "made.tar").write_bytes(made.to_tar())
    assert run(tmp_path / "store", "import", tmp_path / "made.tar").exit_code == 0
    return tmp_path / "store"


def exported(store: Path, target: Path, *arguments: str) -> bytes:
    assert run(store, "export", *arguments, "-o", target).exit_code == 0
    return target.read_bytes()


def test_what_is_exported_is_imported(store, tmp_path):
    bundle = exported(store, tmp_path / "b.tar", "app:1", "app:2")
    result = run(tmp_path / "other", "import", tmp_path / "b.tar")
    assert result.exit_code == 0
    assert result.stdout == "app:1: complete\napp:2: complete\n"
    assert exported(tmp_path / "other", tmp_path / "c.tar", "app:2", "app:1") == bundle


def test_a_list_names_the_images(store, tmp_path):
    (tmp_path / "list").write_text("# ours\napp:1  # the first\n\napp:2\n")
    bundle = exported(store, tmp_path / "b.tar", "-f", str(tmp_path / "list"))
    assert bundle == exported(store, tmp_path / "c.tar", "app:1", "app:2")


def test_a_list_that_is_wrong_in_part_is_done_in_part(store, tmp_path):
    (tmp_path / "list").write_text("app:1\n--help\n")
    result = run(store, "export", "-f", tmp_path / "list", "-o", tmp_path / "b.tar")
    assert result.exit_code == 4
    assert "list:2: " in result.stderr
    assert blob_digests((tmp_path / "b.tar").read_bytes())


def test_a_compose_file_names_the_images_too(store, tmp_path):
    (tmp_path / "list").write_text("services:\n  app: {image: 'app:1'}\n")
    bundle = exported(store, tmp_path / "b.tar", "-f", str(tmp_path / "list"))
    assert bundle == exported(store, tmp_path / "c.tar", "app:1")


def test_a_bundle_is_compressed_if_its_name_says_so(store, tmp_path):
    compressed = exported(store, tmp_path / "b.tar.zst", "app:1")
    assert zstd.decompress(compressed) == exported(store, tmp_path / "b.tar", "app:1")
    assert run(tmp_path / "other", "import", tmp_path / "b.tar.zst").exit_code == 0


@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_a_bundle_in_parts_is_put_together_from_whatever_names_it(store, tmp_path, suffix):
    name = tmp_path / f"b.tar{suffix}"
    assert run(store, "export", "app:1", "-o", name, "--split", "100kB").exit_code == 0
    parts = sorted(tmp_path.glob("b.tar*"))
    assert [part.stat().st_size for part in parts[:-1]] == [100_000] * (len(parts) - 1)
    assert parts[0].name == f"b.tar{suffix}.000"
    for number, named in enumerate(([name], parts[::-1], [parts[1]])):
        result = run(tmp_path / f"other{number}", "import", *named)
        assert (result.exit_code, result.stdout) == (0, "app:1: complete\n")


def test_a_part_that_is_missing_is_named(store, tmp_path):
    name = tmp_path / "b.tar"
    run(store, "export", "app:1", "-o", name, "--split", "100kB")
    parts = sorted(tmp_path.glob("b.tar.*"))
    parts[1].unlink()
    result = run(tmp_path / "other", "import", name)
    assert result.exit_code == 1
    assert "b.tar.001 is missing" in result.stderr
    parts[1].write_bytes(b"")
    parts[-1].unlink()
    result = run(tmp_path / "other", "import", name)
    assert result.exit_code == 1


def test_parts_of_an_earlier_larger_bundle_do_not_stay(store, tmp_path):
    name = tmp_path / "b.tar"
    run(store, "export", "app:1", "-o", name, "--split", "50kB")
    before = len(list(tmp_path.glob("b.tar.*")))
    run(store, "export", "app:1", "-o", name, "--split", "200kB")
    assert len(list(tmp_path.glob("b.tar.*"))) == 2 < before
    assert run(tmp_path / "other", "import", name).exit_code == 0


@pytest.mark.parametrize("form", ["b.tar", "b.tar.zst", "b.tar.000", "layout"])
def test_a_delta_has_what_is_new_since_a_bundle_of_any_form(store, tmp_path, form):
    arguments = ["--split", "100kB"] if form.endswith("000") else []
    name = {"layout": "b.tar", "b.tar.000": "b.tar"}.get(form, form)
    run(store, "export", "app:1", "-o", tmp_path / name, *arguments)
    if form == "layout":
        with tarfile.open(tmp_path / "b.tar") as archive:
            archive.extractall(tmp_path / form, filter="data")
    delta = exported(store, tmp_path / "d.tar", "app:2", "--since", str(tmp_path / form))
    assert digest_of(b"more") in blob_digests(delta)
    assert len(blob_digests(delta)) == 3
    other = tmp_path / "other"
    result = run(other, "import", tmp_path / "d.tar")
    assert result.exit_code == 1
    assert "it lacks 1 blob;" in result.stdout
    assert run(other, "import", tmp_path / form, tmp_path / "d.tar").exit_code == 0


def test_a_bundle_that_is_none_is_no_reason_to_leave_anything_out(store, tmp_path):
    (tmp_path / "none").write_bytes(b"something else")
    result = run(store, "export", "app:1", "-o", tmp_path / "b.tar", "--since", tmp_path / "none")
    assert result.exit_code == 1
    assert not (tmp_path / "b.tar").exists()


def test_a_layout_in_a_directory_is_imported_and_its_links_are_not(store, tmp_path):
    made, digest = build_layout(b"layer", name=f"{APP_FULL_NAME}:3")
    directory = tmp_path / "layout"
    for name, content in unpack_tar(made.to_tar()).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    (directory / "blobs" / "sha256" / ("0" * 64)).symlink_to("/etc/passwd")
    result = run(store, "import", directory, "--json")
    assert result.exit_code == 0
    (report,) = json.loads(result.stdout)
    assert report["images"][0]["digest"] == digest
    assert report["added"] + report["already_stored"] == 3


def test_pipes_are_bundles_too(store, tmp_path):
    result = run(store, "export", "app:1", "-o", "-")
    assert result.exit_code == 0
    bundle = result.stdout_bytes
    assert bundle == exported(store, tmp_path / "b.tar", "app:1")
    assert run(tmp_path / "other", "import", "-", stdin=bundle).exit_code == 0
    assert run(store, "export", "app:1", "-o", "/dev/null").exit_code == 0
    assert Path("/dev/null").is_char_device()


def test_what_fails_leaves_no_file(store, tmp_path):
    (store / blob_path(digest_of(b"more"))).write_bytes(b"most")
    target = tmp_path / "b.tar"
    target.write_bytes(b"the last good one")
    assert run(store, "export", "app:2", "-o", target).exit_code == 1
    assert target.read_bytes() == b"the last good one"
    assert [*tmp_path.glob("*.partial")] == []


def test_the_exit_code_tells_how_much_came(tmp_path):
    made = LayoutBuilder()
    made.list_image(made.add_manifest(b"one"), name=f"{APP_FULL_NAME}:1")
    made.list_image(made.add_manifest(b"two"), name="quay.io/some/thing:1")
    (tmp_path / "b.tar").write_bytes(made.to_tar())
    result = run(tmp_path / "store", "import", tmp_path / "b.tar")
    assert result.exit_code == 4
    assert "quay.io" in result.stdout
    wrong = make_tar({blob_path(digest_of(b"right")): b"wrong"})
    (tmp_path / "w.tar").write_bytes(wrong)
    assert run(tmp_path / "store", "import", tmp_path / "w.tar").exit_code == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "-o", "b.tar"],
        ["export", "app", "-o", "-", "--split", "1GB"],
        ["export", "app", "-o", "b.tar", "--split", "much"],
        ["export", "app", "-o", "b.tar", "--split", "0B"],
        ["import"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(tmp_path, arguments):
    assert run(tmp_path / "store", *arguments).exit_code == 2


def test_json_says_what_was_written(store, tmp_path):
    result = run(store, "export", "app:1", "-o", tmp_path / "b.tar", "--json")
    document = json.loads(result.stdout)
    assert document["files"] == [str(tmp_path / "b.tar")]
    assert document["written"] == document["size"] == (tmp_path / "b.tar").stat().st_size
    assert document["images"][0]["name"] == f"{APP_FULL_NAME}:1"
    with tarfile.open(fileobj=io.BytesIO((tmp_path / "b.tar").read_bytes())) as archive:
        assert archive.getnames()[0] == "oci-layout"
