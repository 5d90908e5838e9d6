"""The check of a libpq connection string. Its messages hold no part of it: any part may be of a password."""

import os
import re

import psycopg2
from psycopg2.extensions import make_dsn, parse_dsn

from exportd.errors import OperatorError

_KEEPALIVES = {
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "2",
    "tcp_user_timeout": "5000",
}
_TARGETS = ("any", "read-write", "primary")
_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_FORMS = "postgresql://user:password@host:5432/name or host=… user=… password='…' dbname=…"


class DsnRefused(OperatorError):
    """libpq cannot use the connection string. The message is for the operator."""


def check_dsn(dsn: str, name: str = "database.dsn") -> None:
    """Raises DsnRefused, with the kind of the mistake. ``name`` is the setting's."""
    if (mistake := _find_mistake(dsn)) is not None:
        raise DsnRefused(f"{name}: {mistake}. It must be {_FORMS}")


def complete_dsn(dsn: str) -> str:
    """Adds what exportd needs: UTF-8, and that a dead connection is noticed while it is idle, or five seconds
    after something was sent. Keepalives of the string's own stay."""
    completed: str = make_dsn(**{**_KEEPALIVES, **parse_dsn(dsn), "client_encoding": "UTF8"})
    return completed


def _find_mistake(dsn: str) -> str | None:
    try:
        fields = parse_dsn(dsn)
    except psycopg2.Error:
        return _kind_of(dsn)
    if "://" in fields.get("dbname", ""):
        return "the name of the database is an address"
    # An unescaped @ or / in a password moves the rest of the password into these fields.
    if any("@" in fields.get(name, "") for name in ("host", "hostaddr", "port")) or (
        "://" in dsn and "@" in fields.get("dbname", "")
    ):
        return "in an address, @ must be written as %40, and / as %2F"
    hosts, addresses, ports = (fields.get(name, "").split(",") for name in ("host", "hostaddr", "port"))
    if not all(port == "" or (port.isascii() and port.isdigit() and 0 < int(port) < 65536) for port in ports):
        return "the port is not a number from 1 to 65535"
    if fields.get("sslmode", "prefer") not in _SSL_MODES:
        return f"sslmode is not one of {', '.join(_SSL_MODES)}"
    if "service" in fields or "PGSERVICE" in os.environ:
        return "a connection service (service, PGSERVICE) is not supported; write its fields here"
    if fields.get("target_session_attrs", "any") not in _TARGETS:
        return f"exportd writes, so target_session_attrs must be {', '.join(_TARGETS)}"
    servers = max(len(hosts), len(addresses))
    if len(ports) not in (1, servers) or (fields.get("hostaddr") and len(hosts) not in (1, servers)):
        return "host, hostaddr and port list different numbers of servers"
    return None


def _kind_of(dsn: str) -> str:
    if dsn[:1] in "'\"":
        return "it is in quotation marks"
    if re.match(r"\s*[a-z0-9+.-]+:/", dsn, re.IGNORECASE):
        if re.match(r"postgres(ql)?://", dsn) is None:
            return "an address begins with postgresql://"
        if re.search(r"%(?![0-9a-fA-F]{2})", dsn):
            return "in an address, % must be written as %25"
        return "it is not a valid address"
    return "it is not valid; a value with spaces needs quotation marks, as in password='two words'"
