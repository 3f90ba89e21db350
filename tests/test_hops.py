import pytest

from proxy.errors import LoopDetectedError
from proxy.hops import MAX_HOPS, enter_hop, via_header

OWN, OTHER = "0" * 16, "f" * 16


@pytest.fixture(autouse=True)
def _first_request():
    yield
    enter_hop(None, OWN)


def test_the_caches_of_one_request_are_not_those_of_the_next():
    enter_hop(f"1.1 pullcache-{OTHER}", OWN)
    assert via_header(OWN) == f"1.1 pullcache-{OTHER}, 1.1 pullcache-{OWN}"
    enter_hop(None, OWN)
    assert via_header(OWN) == f"1.1 pullcache-{OWN}"


def test_a_request_that_comes_back_is_refused():
    with pytest.raises(LoopDetectedError):
        enter_hop(f"1.1 pullcache-{OTHER}, 1.1 pullcache-{OWN}", OWN)


def test_only_ids_of_caches_are_passed_on_and_only_some():
    enter_hop("1.1 squid, " + ", ".join(f"1.1 pullcache-{n:016x}" for n in range(1, 40)), OWN)
    assert via_header(OWN).count("pullcache-") == MAX_HOPS
    assert "squid" not in via_header(OWN)
