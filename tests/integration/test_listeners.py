"""On which addresses the daemon listens."""

import errno
import socket
from typing import Any

import pytest

from exportd.process.listeners import ServerError, listen
from exportd.settings.sections import ServerSettings


def families(host: str) -> set[int]:
    sockets = listen(ServerSettings(host=host, port=0))
    try:
        assert len({opened.getsockname()[1] for opened in sockets}) == 1
        return {opened.family for opened in sockets}
    finally:
        for opened in sockets:
            opened.close()


def test_the_ipv6_wildcard_is_every_address() -> None:
    try:
        socket.create_server(("::", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    assert families("::") == {socket.AF_INET, socket.AF_INET6}


def test_a_family_that_the_machine_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.create_server
    lacking = {socket.AF_INET6}

    def create_server(address: Any, *, family: int, **options: Any) -> socket.socket:
        if family in lacking:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(address, family=family, **options)

    monkeypatch.setattr(socket, "create_server", create_server)
    assert families("::") == families("localhost") == {socket.AF_INET}
    lacking.add(socket.AF_INET)
    with pytest.raises(ServerError, match="cannot listen on localhost:0: Address family not supported"):
        listen(ServerSettings(host="localhost", port=0))
