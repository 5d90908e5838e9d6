"""A proxy on loopback that is as bad as a train: it resets every connection after some bytes."""

import contextlib
import random
import socket
import struct
import threading


class CuttingProxy:
    """Passes on to ``port``, and resets each of the first ``cuts`` connections after some bytes.

    How many is random, by ``seed``; ``largest`` is the most. Connections after the last cut are left alone.
    """

    def __init__(self, port: int, cuts: int, largest: int, seed: int = 0) -> None:
        self._target = port
        self._random = random.Random(seed)
        self._limits = [self._random.randint(1, largest) for _ in range(cuts)]
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        # Wakes accept(); close() alone would leave it waiting.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)

    def cut(self) -> None:
        """Resets every connection that is open now."""
        for side in self._sockets:
            with contextlib.suppress(OSError):
                _reset_at_close(side)
                side.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                limit = self._limits[self.connections] if self.connections < len(self._limits) else None
                self.connections += 1
                server = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [client, server]
                for arguments in ((client, server, None), (server, client, limit)):
                    thread = threading.Thread(target=_pump, args=arguments, daemon=True)
                    self._threads.append(thread)
                    thread.start()


def _pump(source: socket.socket, sink: socket.socket, limit: int | None) -> None:
    """Copies until the source ends or ``limit`` bytes have passed; then resets both sides."""
    passed = 0
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            if limit is not None and passed + len(data) >= limit:
                sink.sendall(data[: limit - passed])
                for side in (source, sink):
                    _reset_at_close(side)
                break
            sink.sendall(data)
            passed += len(data)
    for side in (source, sink):
        with contextlib.suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)
        side.close()


def _reset_at_close(side: socket.socket) -> None:
    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
