"""Whose request a proxy passes on: X-Forwarded-For, and Forwarded (RFC 7239)."""

import re
from collections.abc import Collection, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_ADDRESS = re.compile(r"\[([^\]]*)\](?::\d+)?|([\d.]+)(?::\d+)?", re.ASCII)
_FOR = re.compile(r'(?:^|;)\s*for\s*=\s*("?)([^";]*)\1\s*(?:;|$)', re.IGNORECASE)


def client_address(peer: str, forwarded: Sequence[str], trusted: Collection[Network]) -> str:
    """The address of the client: the first from the right that is no trusted proxy's.

    ``forwarded`` holds the addresses that proxies noted, the nearest last. What a proxy that nobody trusts
    has written down counts for nothing, and the walk ends at what cannot be read.
    """
    present = parse_address(peer)
    if present is None:
        return peer
    for text in reversed(forwarded):
        if not any(present in network for network in trusted):
            break
        further = parse_address(text)
        if further is None:
            break
        present = further
    return str(present)


def forwarded_addresses(name: str, fields: Sequence[str]) -> list[str]:
    """The addresses in the values of the field of that name, ``X-Forwarded-For`` or ``Forwarded``."""
    members = [member.strip() for field in fields for member in field.split(",")]
    if name.lower() != "forwarded":
        return members
    return [found[2].strip() if (found := _FOR.search(member)) else "" for member in members]


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
