"""Which client a request is from, behind proxies that are trusted, and what a client may forge."""

import pytest

from proxy.server.clients.address import Networks, resolve_client

PROXIES = Networks(["10.0.0.0/8", "2001:db8:ff::/48"])


@pytest.mark.parametrize(
    ("address", "is_in"),
    [
        ("10.1.2.3", True),
        ("::ffff:10.1.2.3", True),
        ("2001:db8:ff::7", True),
        ("11.0.0.1", False),
        ("2001:db8::7", False),
        ("", False),
        ("no address", False),
        ("fe80::1%eth0", False),
    ],
)
def test_an_address_is_in_one_of_the_networks_or_not(address, is_in):
    assert (address in PROXIES) == is_in
    assert address not in Networks()


@pytest.mark.parametrize(
    ("header", "client"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("192.0.2.1:4711", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::1"),
        ("[2001:db8::1]:80", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        # What stands left of the first address that is no proxy, the client has written.
        ("198.51.100.9, 192.0.2.1", "192.0.2.1"),
        ("192.0.2.1, 10.9.9.9", "192.0.2.1"),
        ("198.51.100.9,192.0.2.1 , 10.9.9.9,\t10.8.8.8", "192.0.2.1"),
        # Proxies all the way.
        ("10.9.9.9, 10.8.8.8", "10.9.9.9"),
        # Where the chain breaks, the last proxy counts.
        ("192.0.2.1, unknown", "10.0.0.1"),
        ("unknown, 10.9.9.9", "10.9.9.9"),
        ("", "10.0.0.1"),
        (", ,", "10.0.0.1"),
        ("192.0.2.1; evil", "10.0.0.1"),
        ("192.0.2.300", "10.0.0.1"),
        ("[2001:db8::1", "2001:db8::1"),
    ],
)
def test_the_rightmost_address_that_is_no_proxy_counts(header, client):
    assert resolve_client("10.0.0.1", {"x-forwarded-for": header}, PROXIES) == client


@pytest.mark.parametrize(
    ("header", "client"),
    [
        ("for=192.0.2.1", "192.0.2.1"),
        ('For="[2001:db8::1]:4711"', "2001:db8::1"),
        ("for=192.0.2.1;proto=http;by=203.0.113.43", "192.0.2.1"),
        ("proto=https; for=192.0.2.1", "192.0.2.1"),
        ("for=198.51.100.9, for=192.0.2.1, for=10.9.9.9", "192.0.2.1"),
        ("for=10.9.9.9, for=10.8.8.8", "10.9.9.9"),
        ("for=198.51.100.9, for=unknown", "10.0.0.1"),
        ("for=198.51.100.9, for=_hidden", "10.0.0.1"),
        ("for=198.51.100.9, by=10.0.0.1", "10.0.0.1"),
        ('for="198.51.100.9, for=192.0.2.1', "192.0.2.1"),
        ("", "10.0.0.1"),
    ],
)
def test_forwarded_is_read_as_rfc_7239_says(header, client):
    assert resolve_client("10.0.0.1", {"forwarded": header}, PROXIES) == client


def test_a_client_that_is_no_proxy_cannot_name_another():
    headers = {"x-forwarded-for": "192.0.2.1", "forwarded": "for=192.0.2.1"}
    assert resolve_client("198.51.100.9", headers, PROXIES) == "198.51.100.9"


def test_two_headers_count_only_if_they_agree():
    headers = {"x-forwarded-for": "192.0.2.1", "forwarded": "for=192.0.2.1"}
    assert resolve_client("10.0.0.1", headers, PROXIES) == "192.0.2.1"
    headers["forwarded"] = "for=198.51.100.9"
    assert resolve_client("10.0.0.1", headers, PROXIES) == "10.0.0.1"
    assert resolve_client("10.0.0.1", {}, PROXIES) == "10.0.0.1"
