"""Whose request a proxy passes on: X-Forwarded-For, and Forwarded (RFC 7239)."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_ADDRESS = re.compile(r"\[([^\]]*)\](?::\d+)?|([\d.]+)(?::\d+)?", re.ASCII)


def client_address(peer: str, forwarded: Iterable[str], trusted: Collection[Network]) -> str:
    """The address of the client: the first that is no trusted proxy's, from the peer on.

    ``forwarded`` holds the addresses that proxies forwarded, the nearest first. What a proxy that nobody
    trusts has written down counts for nothing and is not read, and the walk ends at what cannot be read.
    """
    present = parse_address(peer)
    if present is None:
        return peer
    remaining = iter(forwarded)
    while any(present in network for network in trusted):
        further = parse_address(next(remaining, ""))
        if further is None:
            break
        present = further
    return str(present)


def forwarded_addresses(name: str, fields: Sequence[str]) -> Iterator[str]:
    """The addresses in the values of the field of that name, ``X-Forwarded-For`` or ``Forwarded``, the
    nearest proxy's first.

    A comma ends a member even in quotes, so that what a client leaves open swallows no proxy's note.
    """
    read = _for_parameter if name.lower() == "forwarded" else str.strip
    for field in reversed(fields):
        for member in reversed(field.split(",")):
            yield read(member)


def _for_parameter(member: str) -> str:
    for pair in member.split(";"):
        name, _, value = pair.partition("=")
        if name.strip().lower() == "for":
            value = value.strip()
            return value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value
    return ""


def parse_address(text: str) -> Address | None:
    """With or without a port; IPv4 in IPv6's clothes is IPv4."""
    match = _ADDRESS.fullmatch(text)
    bare = (match[1] or match[2]) if match else text
    try:
        address = ip_address(bare)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def subscriber(address: str) -> str:
    """What limits count by: an address, or the /64 that an IPv6 client has whole."""
    parsed = parse_address(address)
    if isinstance(parsed, IPv6Address):
        return str(ip_network((int(parsed), 64), strict=False))
    return address
