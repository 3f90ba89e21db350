"""The directories of imports after a kill."""

import pytest

from proxy.oci.digest import Digest
from proxy.storage.blobs import BlobStore

CONTENT = b"what a bundle brings"
DIGEST = Digest.from_content(CONTENT)


def restarted(store: BlobStore) -> BlobStore:
    root = store.root
    store.close()
    return BlobStore(root)


def test_partial_files_of_a_killed_import_are_removed_at_the_next_start(tmp_path):
    store = BlobStore(tmp_path)
    ingest = store.open_ingest(DIGEST, store.make_import_directory())
    ingest.append([CONTENT[:5]])
    ingest.close()
    store = restarted(store)
    assert list((tmp_path / "ingest").iterdir()) == []
    assert store.list_committed_ingests() == []
    store.close()


@pytest.mark.parametrize("is_downloaded", [False, True])
def test_a_committed_blob_of_an_import_has_a_marker_until_it_is_indexed(tmp_path, is_downloaded):
    store = BlobStore(tmp_path)
    ingest = store.open_ingest(DIGEST, store.make_import_directory())
    ingest.append([CONTENT])
    ingest.commit()
    ingest.close()
    if is_downloaded:
        # It is stored too, so the partial download is not needed any more.
        download = store.open_ingest(DIGEST)
        download.append([CONTENT[:5]])
        download.close()
    store = restarted(store)
    assert store.list_committed_ingests() == [DIGEST]
    assert store.list_ingests() == []
    store.delete_ingest(DIGEST)
    assert list((tmp_path / "ingest").iterdir()) == []
    store.close()


def test_an_import_and_a_download_of_the_same_blob_do_not_interfere(tmp_path):
    store = BlobStore(tmp_path)
    folder = store.make_import_directory()
    ingests = [store.open_ingest(DIGEST, folder), store.open_ingest(DIGEST)]
    for ingest in ingests:
        ingest.append([CONTENT])
        assert ingest.matches_digest()
        ingest.commit()
        ingest.delete_state()
        ingest.close()
    store.remove_import_directory(folder)
    assert (tmp_path / "blobs" / "sha256" / DIGEST.hex).read_bytes() == CONTENT
    assert list((tmp_path / "ingest").iterdir()) == []
    store.close()
