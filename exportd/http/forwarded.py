"""The client behind proxies: X-Forwarded-For, and Forwarded (RFC 7239)."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_ADDRESS = re.compile(r"\[([^\]]*)\](?::\d+)?|([\d.]+)(?::\d+)?", re.ASCII)


def client_address(peer: str, forwarded: Iterable[str], trusted: Collection[Network]) -> str:
    """Returns the client's address: the first one, from the peer on, that is not a trusted proxy's.

    ``forwarded`` holds the addresses that proxies reported, the nearest first. Addresses behind an untrusted
    one are not read, and an unreadable one ends the search.
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
    """Yields the addresses in the values of ``X-Forwarded-For`` or ``Forwarded``, the nearest proxy's first.

    A comma ends a member even in quotes, so that an unclosed quote of a client hides no proxy's member.
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
    """Parses an address with or without a port. An IPv4-mapped IPv6 address is IPv4."""
    match = _ADDRESS.fullmatch(text)
    bare = (match[1] or match[2]) if match else text
    try:
        address = ip_address(bare)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def subscriber(address: str) -> str:
    """The unit of limits: an IPv4 address, or the /64 network of an IPv6 address."""
    parsed = parse_address(address)
    if isinstance(parsed, IPv6Address):
        return str(ip_network((int(parsed), 64), strict=False))
    return address
