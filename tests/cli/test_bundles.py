"""`pullcache export` and `pullcache import`, on stores without a daemon."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from backports import zstd
from click.testing import Result

from proxy.cli.display.text import format_bytes
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
from tests.support.commands import run


def run_in(store: Path, command: str, *arguments: str | Path, stdin: bytes = b"") -> Result:
    return run(command, "--store", store, *arguments, stdin=stdin)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with two versions of an image; the second has one more layer."""
    made = LayoutBuilder()
    common = os.urandom(300_000)
    made.list_image(made.add_manifest(common), name=f"{APP_FULL_NAME}:1")
    made.list_image(made.add_manifest(common, b"more"), name=f"{APP_FULL_NAME}:2")
    (tmp_path / "made.tar").write_bytes(made.to_tar())
    assert run_in(tmp_path / "store", "import", tmp_path / "made.tar").exit_code == 0
    return tmp_path / "store"


def export(store: Path, target: Path, *arguments: str) -> bytes:
    """Export to `target`; return its content."""
    assert run_in(store, "export", *arguments, "-o", target).exit_code == 0
    return target.read_bytes()


def test_an_exported_bundle_can_be_imported(store, tmp_path):
    bundle = export(store, tmp_path / "b.tar", "app:1", "app:2")
    result = run_in(tmp_path / "other", "import", tmp_path / "b.tar")
    assert result.exit_code == 0
    assert result.stdout == "app:1: complete\napp:2: complete\n"
    assert export(tmp_path / "other", tmp_path / "c.tar", "app:2", "app:1") == bundle


def test_an_image_list_names_the_images(store, tmp_path):
    (tmp_path / "list").write_text("# ours\napp:1  # the first\n\napp:2\n")
    bundle = export(store, tmp_path / "b.tar", "-f", str(tmp_path / "list"))
    assert bundle == export(store, tmp_path / "c.tar", "app:1", "app:2")


def test_invalid_entries_of_a_list_are_reported_and_the_others_exported(store, tmp_path):
    (tmp_path / "list").write_text("app:1\n--help\n")
    result = run_in(store, "export", "-f", tmp_path / "list", "-o", tmp_path / "b.tar")
    assert result.exit_code == 4
    assert "list:2: " in result.stderr
    assert blob_digests((tmp_path / "b.tar").read_bytes())


def test_a_compose_file_is_an_image_list_too(store, tmp_path):
    (tmp_path / "list").write_text("services:\n  app: {image: 'app:1'}\n")
    bundle = export(store, tmp_path / "b.tar", "-f", str(tmp_path / "list"))
    assert bundle == export(store, tmp_path / "c.tar", "app:1")


def test_a_bundle_whose_name_ends_in_zst_is_compressed(store, tmp_path):
    compressed = export(store, tmp_path / "b.tar.zst", "app:1")
    assert zstd.decompress(compressed) == export(store, tmp_path / "b.tar", "app:1")
    assert run_in(tmp_path / "other", "import", tmp_path / "b.tar.zst").exit_code == 0


@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_a_split_bundle_may_be_named_by_any_of_its_parts(store, tmp_path, suffix):
    name = tmp_path / f"b.tar{suffix}"
    assert run_in(store, "export", "app:1", "-o", name, "--split", "100kB").exit_code == 0
    parts = sorted(tmp_path.glob("b.tar*"))
    assert [part.stat().st_size for part in parts[:-1]] == [100_000] * (len(parts) - 1)
    assert parts[0].name == f"b.tar{suffix}.000"
    for number, arguments in enumerate(([name], parts[::-1], [parts[1]])):
        result = run_in(tmp_path / f"other{number}", "import", *arguments)
        assert (result.exit_code, result.stdout) == (0, "app:1: complete\n")


def test_a_missing_part_is_named(store, tmp_path):
    name = tmp_path / "b.tar"
    run_in(store, "export", "app:1", "-o", name, "--split", "100kB")
    parts = sorted(tmp_path.glob("b.tar.*"))
    parts[1].unlink()
    result = run_in(tmp_path / "other", "import", name)
    assert result.exit_code == 1
    assert "b.tar.001 is missing; a bundle needs all its parts" in result.stderr


def test_a_missing_last_part_is_an_error(store, tmp_path):
    name = tmp_path / "b.tar"
    run_in(store, "export", "app:1", "-o", name, "--split", "100kB")
    parts = sorted(tmp_path.glob("b.tar.*"))
    parts[1].write_bytes(b"")
    parts[-1].unlink()
    assert run_in(tmp_path / "other", "import", name).exit_code == 1


def test_parts_of_an_earlier_larger_bundle_are_deleted(store, tmp_path):
    name = tmp_path / "b.tar"
    run_in(store, "export", "app:1", "-o", name, "--split", "50kB")
    before = len(list(tmp_path.glob("b.tar.*")))
    run_in(store, "export", "app:1", "-o", name, "--split", "200kB")
    assert len(list(tmp_path.glob("b.tar.*"))) == 2 < before
    assert run_in(tmp_path / "other", "import", name).exit_code == 0


@pytest.mark.parametrize("form", ["b.tar", "b.tar.zst", "b.tar.000", "layout"])
def test_a_bundle_since_another_one_contains_new_blobs_only(store, tmp_path, form):
    arguments = ["--split", "100kB"] if form.endswith("000") else []
    name = {"layout": "b.tar", "b.tar.000": "b.tar"}.get(form, form)
    run_in(store, "export", "app:1", "-o", tmp_path / name, *arguments)
    if form == "layout":
        shutil.unpack_archive(tmp_path / "b.tar", tmp_path / form, format="tar")
    delta = export(store, tmp_path / "d.tar", "app:2", "--since", str(tmp_path / form))
    assert digest_of(b"more") in blob_digests(delta)
    assert len(blob_digests(delta)) == 3
    other = tmp_path / "other"
    result = run_in(other, "import", tmp_path / "d.tar")
    assert result.exit_code == 1
    assert "not imported, 1 blob missing; " in result.stdout
    assert run_in(other, "import", tmp_path / form, tmp_path / "d.tar").exit_code == 0


def test_an_export_since_something_else_than_a_bundle_fails(store, tmp_path):
    (tmp_path / "none").write_bytes(b"something else")
    since = ("--since", tmp_path / "none")
    result = run_in(store, "export", "app:1", "-o", tmp_path / "b.tar", *since)
    assert result.exit_code == 1
    assert not (tmp_path / "b.tar").exists()


def test_a_layout_directory_is_imported_without_its_symbolic_links(store, tmp_path):
    made, digest = build_layout(b"layer", name=f"{APP_FULL_NAME}:3")
    directory = tmp_path / "layout"
    for name, content in unpack_tar(made.to_tar()).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    (directory / "blobs" / "sha256" / ("0" * 64)).symlink_to("/etc/passwd")
    result = run_in(store, "import", directory, "--json")
    assert result.exit_code == 0
    (report,) = json.loads(result.stdout)
    assert report["images"][0]["digest"] == digest
    assert report["added"] + report["already_stored"] == 3


def test_a_bundle_can_be_piped(store, tmp_path):
    result = run_in(store, "export", "app:1", "-o", "-")
    assert result.exit_code == 0
    bundle = result.stdout_bytes
    assert bundle == export(store, tmp_path / "b.tar", "app:1")
    assert run_in(tmp_path / "other", "import", "-", stdin=bundle).exit_code == 0


def test_an_export_to_a_device_leaves_it_a_device(store):
    assert run_in(store, "export", "app:1", "-o", "/dev/null").exit_code == 0
    assert Path("/dev/null").is_char_device()


def test_a_failed_export_leaves_the_previous_file(store, tmp_path):
    (store / blob_path(digest_of(b"more"))).write_bytes(b"most")
    target = tmp_path / "b.tar"
    target.write_bytes(b"the previous one")
    assert run_in(store, "export", "app:2", "-o", target).exit_code == 1
    assert target.read_bytes() == b"the previous one"
    assert [*tmp_path.glob("*.partial")] == []


def test_an_import_of_some_of_the_images_is_exit_code_4(tmp_path):
    made = LayoutBuilder()
    made.list_image(made.add_manifest(b"one"), name=f"{APP_FULL_NAME}:1")
    made.list_image(made.add_manifest(b"two"), name="quay.io/some/thing:1")
    (tmp_path / "b.tar").write_bytes(made.to_tar())
    result = run_in(tmp_path / "store", "import", tmp_path / "b.tar")
    assert result.exit_code == 4
    assert "quay.io" in result.stdout


def test_an_import_with_a_digest_mismatch_is_exit_code_3(tmp_path):
    (tmp_path / "b.tar").write_bytes(make_tar({blob_path(digest_of(b"right")): b"wrong"}))
    assert run_in(tmp_path / "store", "import", tmp_path / "b.tar").exit_code == 3


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
    assert run_in(tmp_path / "store", *arguments).exit_code == 2


def test_json_describes_the_exported_bundle(store, tmp_path):
    result = run_in(store, "export", "app:1", "-o", tmp_path / "b.tar", "--json")
    document = json.loads(result.stdout)
    assert document["files"] == [str(tmp_path / "b.tar")]
    assert document["written"] == document["size"] == (tmp_path / "b.tar").stat().st_size
    assert document["images"][0]["name"] == f"{APP_FULL_NAME}:1"
    with tarfile.open(fileobj=io.BytesIO((tmp_path / "b.tar").read_bytes())) as archive:
        assert archive.getnames()[0] == "oci-layout"


def test_the_summary_of_an_export_goes_to_stderr(store, tmp_path):
    arguments = ("app:1", "app:2", "-o", tmp_path / "b.tar", "--split", "100kB")
    result = run_in(store, "export", *arguments)
    assert (result.exit_code, result.stdout) == (0, "")
    size = format_bytes(sum(part.stat().st_size for part in tmp_path.glob("b.tar.*")))
    assert result.stderr == f"2 images, 6 blobs, {size} in 4 parts\n"
