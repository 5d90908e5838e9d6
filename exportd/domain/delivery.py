"""Deliveries, and the events that record them. Times are aware, in UTC."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from uuid import UUID, uuid4


class Outcome(StrEnum):
    """How a delivery ended. An event may also be ``running`` or ``lost``."""

    # The client's kernel has acknowledged every byte.
    COMPLETED = "completed"
    # By the client, or at shutdown.
    ABORTED = "aborted"
    # The package could not be read.
    FAILED = "failed"
    # The package was written to during the delivery.
    CHANGED = "changed"
    # It has not ended yet.
    RUNNING = "running"
    # The daemon was killed during the delivery.
    LOST = "lost"


class Method(StrEnum):
    """How the bytes of a package are sent."""

    SENDFILE = "sendfile"
    CHUNKS = "chunks"


class Failure(StrEnum):
    """Why a delivery failed: a label of metrics."""

    CLIENT_DISCONNECTED = "client_disconnected"
    STALLED = "stalled"
    TOO_SLOW = "too_slow"
    SHUTDOWN = "shutdown"
    UNREADABLE = "unreadable"
    CHANGED = "changed"


# The reasons of deliveries that the daemon ended.
_ABORTS = {
    "stalled": Failure.STALLED,
    "too slow": Failure.TOO_SLOW,
    "shutdown": Failure.SHUTDOWN,
}


@dataclass(frozen=True, slots=True)
class Delivery:
    """One response body that has ended.

    ``reason`` explains every outcome but ``completed``. ``first_byte_at`` is when the headers were out, by
    ``time.perf_counter``; None: never.
    """

    outcome: Outcome
    reason: str | None
    method: Method
    bytes_sent: int
    bytes_acknowledged: int
    first_byte_at: float | None
    duration_seconds: float

    @property
    def failure(self) -> Failure | None:
        """None where the delivery is completed."""
        match self.outcome:
            case Outcome.COMPLETED:
                return None
            case Outcome.FAILED:
                return Failure.UNREADABLE
            case Outcome.CHANGED:
                return Failure.CHANGED
        # Every other reason is the system's message about a connection that the client ended.
        return _ABORTS.get(self.reason or "", Failure.CLIENT_DISCONNECTED)


def first_bytes(parts: Sequence[tuple[int, int]], count: int) -> tuple[tuple[int, int], ...]:
    """The first ``count`` bytes of parts of a package, as (start, stop)."""
    found = []
    for start, stop in parts:
        length = min(stop - start, count)
        if length:
            found.append((start, start + length))
        count -= length
    return tuple(found)


def new_event_id(started_at: datetime) -> UUID:
    """A UUID of version 7 (RFC 9562), so that rows of deliveries that start together lie together."""
    milliseconds = int(started_at.timestamp() * 1000)
    # The variant's bits are the same in version 4.
    return UUID(int=milliseconds << 80 | 7 << 76 | uuid4().int & (1 << 76) - 1)


@dataclass(frozen=True, slots=True)
class DownloadEvent:
    """The record of one delivery.

    ``requested`` and ``received`` hold (start, stop) of each part of the package that was requested, and that
    the client acknowledged. ``http_status`` is the response's. ``daemon_id`` is the process.
    """

    event_id: UUID
    job_id: UUID
    user_id: str
    started_at: datetime
    duration_seconds: float
    outcome: Outcome
    http_status: int
    requested: tuple[tuple[int, int], ...]
    received: tuple[tuple[int, int], ...]
    bytes_sent: int
    package_size_bytes: int
    request_id: str
    bytes_acknowledged: int
    reason: str | None
    method: Method | None
    daemon_id: UUID
    package_sha256: str = ""

    @property
    def bytes_requested(self) -> int:
        return sum(stop - start for start, stop in self.requested)

    @property
    def is_whole(self) -> bool:
        """Whether this delivery alone is a download: every byte of the package was acknowledged."""
        whole = (0, self.package_size_bytes)
        return self.outcome == Outcome.COMPLETED and (
            self.received == (whole,) or not self.package_size_bytes
        )
