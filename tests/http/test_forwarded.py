"""Whose address it is, when proxies say so."""

import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exportd.http.forwarded import client_address, forwarded_addresses, subscriber

TRUSTED = [ip_network("10.0.0.0/8"), ip_network("fd00::/8")]


@pytest.mark.parametrize(
    ("peer", "noted", "client"),
    [
        ("10.0.0.1", ["203.0.113.7"], "203.0.113.7"),
        ("10.0.0.1", ["6.6.6.6, 203.0.113.7"], "203.0.113.7"),
        ("10.0.0.1", ["6.6.6.6", "203.0.113.7, 10.0.0.2"], "203.0.113.7"),
        ("198.51.100.1", ["203.0.113.7"], "198.51.100.1"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.7, unknown"], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.7, nonsense, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("10.0.0.1", ["203.0.113.7:4711"], "203.0.113.7"),
        ("10.0.0.1", ["[2001:db8::1]:4711"], "2001:db8::1"),
        ("fd00::1", ["2001:db8::1"], "2001:db8::1"),
        ("::ffff:10.0.0.1", ["::ffff:203.0.113.7"], "203.0.113.7"),
        ("", ["203.0.113.7"], ""),
    ],
)
def test_the_walk_goes_from_the_right(peer: str, noted: list[str], client: str) -> None:
    assert client_address(peer, forwarded_addresses("X-Forwarded-For", noted), TRUSTED) == client


@pytest.mark.parametrize(
    ("field", "addresses"),
    [
        ("for=192.0.2.60;proto=http;by=203.0.113.43", ["192.0.2.60"]),
        ('For="[2001:db8:cafe::17]:4711"', ["[2001:db8:cafe::17]:4711"]),
        ("for=192.0.2.43, for=198.51.100.17", ["192.0.2.43", "198.51.100.17"]),
        ("proto=http; for=192.0.2.43 ;host=x", ["192.0.2.43"]),
        ("host=x", [""]),
        ("for=_hidden", ["_hidden"]),
        ("xfor=192.0.2.43", [""]),
        ('for="', ['"']),
        ('for="192.0.2.43', ['"192.0.2.43']),
        ('for="6.6.6.6, for=192.0.2.43', ['"6.6.6.6', "192.0.2.43"]),
    ],
)
def test_forwarded_is_read(field: str, addresses: list[str]) -> None:
    assert list(forwarded_addresses("Forwarded", [field])) == addresses[::-1]


@pytest.mark.parametrize("name", ["Forwarded", "X-Forwarded-For"])
def test_the_notes_of_whom_nobody_trusts_are_not_even_read(name: str) -> None:
    fields = unread(["for=203.0.113.7" if name == "Forwarded" else "203.0.113.7"])
    assert client_address("198.51.100.1", forwarded_addresses(name, fields), TRUSTED) == "198.51.100.1"
    assert not fields.is_read
    assert client_address("10.0.0.1", forwarded_addresses(name, fields), TRUSTED) == "203.0.113.7"
    assert fields.is_read


class unread(list[str]):  # noqa: N801  # a list that notes whether it was looked at
    is_read = False

    def __reversed__(self) -> Iterator[str]:
        self.is_read = True
        return super().__reversed__()


@pytest.mark.parametrize(
    "member", ["for=" + " " * 8000 + '"x', ";" * 8000, "for=" * 2000, '"' * 8000, "," * 8000]
)
def test_a_field_is_read_once(member: str) -> None:
    """In a process of its own: an expression that backtracks cannot be stopped from outside."""
    script = (
        "import sys; from exportd.http.forwarded import forwarded_addresses;"
        "list(forwarded_addresses('Forwarded', [sys.stdin.read()]))"
    )
    subprocess.run([sys.executable, "-c", script], input=member, text=True, check=True, timeout=30)


@given(st.text(), st.lists(st.text()), st.sampled_from(["Forwarded", "X-Forwarded-For"]))
def test_any_forwarded_field_is_parsed_or_ignored(peer: str, fields: list[str], name: str) -> None:
    client_address(peer, forwarded_addresses(name, fields), TRUSTED)
    client_address("10.0.0.1", forwarded_addresses(name, fields), TRUSTED)


def test_an_ipv6_client_is_its_network() -> None:
    assert subscriber("2001:db8:1:2:3:4:5:6") == subscriber("2001:db8:1:2::") == "2001:db8:1:2::/64"
    assert subscriber("203.0.113.7") == subscriber("::ffff:203.0.113.7").removeprefix("::ffff:")
