"""Lists and searches of the index are read in threads, so that they delay no other request."""

import threading

import pytest

from proxy.cache import listings, search
from proxy.images.manage import ImageManager
from tests.support.admin_api import list_images


@pytest.fixture
def read_in(monkeypatch) -> dict[str, set[str]]:
    """The threads in which each of the functions has run."""
    threads: dict[str, set[str]] = {}

    def record(owner: object, name: str) -> None:
        function = getattr(owner, name)

        def run_and_record(*args: object, **kwargs: object) -> object:
            threads.setdefault(name, set()).add(threading.current_thread().name)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, run_and_record)

    record(listings, "list_repositories")
    record(listings, "list_tags")
    record(listings, "encode_tags")
    record(search, "search_repositories")
    record(ImageManager, "_summarize")
    return threads


async def test_m05_lists_and_searches_of_the_index_are_read_in_threads(registry, program, read_in):
    image = registry.add_image()
    await program.manifest(image)
    assert (await program.ask("/v2/_catalog?n=100")).json["repositories"] == ["library/app"]
    assert (await program.ask("/v1/search?q=")).json["num_results"] == 1
    async with registry.down():
        assert (await program.ask("/v2/library/app/tags/list")).json["tags"] == ["latest"]
    assert len(await list_images(program)) == 1
    assert set(read_in) == {
        *("list_repositories", "list_tags", "encode_tags", "search_repositories", "_summarize")
    }
    assert threading.main_thread().name not in set.union(*read_in.values())
