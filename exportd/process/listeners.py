"""Listening sockets, TLS, and the number of connections that a process can hold."""

import asyncio
import errno
import os
import resource
import socket
import ssl
from typing import Any

from exportd.errors import OperatorError
from exportd.settings import ServerSettings

BACKLOG = 1024
_ENOUGH_DESCRIPTORS = 65536
# For the database, logs, metrics and the event loop.
_SPARE_DESCRIPTORS = 128


class ServerError(OperatorError):
    """The server cannot start."""


def listen(settings: ServerSettings) -> list[socket.socket]:
    """Opens a listening socket for each address of the host, all on one port. Leaves addresses out that the
    machine does not have, if it has another. Raises ServerError."""
    port = settings.port
    # "::" alone would be IPv6 only, and a socket for both families would hide IPv4 addresses in IPv6 ones.
    hosts = ["::", "0.0.0.0"] if settings.host == "::" else [settings.host]  # noqa: S104  # the operator's choice
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, host in _addresses_of(hosts):
            try:
                sockets.append(socket.create_server((host, port), family=family, backlog=BACKLOG))
            except OSError as error:
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
                missing = error
            else:
                port = sockets[0].getsockname()[1]
        if missing is not None and not sockets:
            raise missing
    except OSError as error:
        for opened in sockets:
            opened.close()
        # The event loops' and getaddrinfo's own messages say too much or too little.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise ServerError(f"cannot listen on {settings.host}:{settings.port}: {reason}") from error
    return sockets


def _addresses_of(hosts: list[str]) -> list[tuple[int, str]]:
    """The families and addresses of the hosts. Raises OSError."""
    found = [
        entry
        for host in hosts
        for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    ]
    return list(dict.fromkeys((entry[0], str(entry[4][0])) for entry in found))


def address_of(settings: ServerSettings, opened: socket.socket) -> str:
    """Returns the URL of a listening socket."""
    host, port = opened.getsockname()[:2]
    scheme = "https" if settings.tls_cert else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def tls_context(settings: ServerSettings) -> ssl.SSLContext | None:
    """Loads the certificate, if there is one. Raises ServerError."""
    if settings.tls_cert is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ServerError(f"the TLS certificate or key cannot be used: {error}") from error
    return context


def room_for_connections() -> int:
    """Returns how many connections the process has descriptors for. Raises the limit on descriptors if it
    may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _ENOUGH_DESCRIPTORS and soft < hard:
        soft = min(hard, _ENOUGH_DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    # A download takes three: its connection, a duplicate of it, and the package.
    return max(1, (soft - _SPARE_DESCRIPTORS) // 3)


def limit_handshakes(loop: asyncio.AbstractEventLoop, seconds: float) -> None:
    """Limits the time of TLS handshakes on every server that ``loop`` makes.

    aiohttp 3.14's sites, which gunicorn's worker uses too, cannot set it. The event loop's default is a
    minute, and no limit on connections counts those in a handshake.
    """
    create_server = loop.create_server

    async def limited(*arguments: Any, ssl: ssl.SSLContext | None = None, **options: Any) -> asyncio.Server:
        if ssl is not None:
            options |= {"ssl": ssl, "ssl_handshake_timeout": seconds}
        return await create_server(*arguments, **options)

    loop.create_server = limited  # type: ignore[method-assign, assignment]
