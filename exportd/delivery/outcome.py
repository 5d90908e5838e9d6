"""How a delivery went."""

from dataclasses import dataclass
from typing import Protocol


class DeliveryAborted(Exception):
    """The client went away before the last byte. The message says how."""


class PackageUnreadable(Exception):
    """The system refused to read the open package. The message says why."""


METHODS = ("sendfile", "chunks")
# Why a delivery fails, as metrics tell it.
FAILURES = ("client_disconnected", "stalled", "too_slow", "shutdown", "unreadable", "changed")


class Observer(Protocol):
    """Is told how deliveries go, slice by slice; must cost next to nothing."""

    def bytes_sent(self, method: str, count: int) -> None:
        """So many bytes of a package were handed to the kernel, by ``sendfile`` or by ``chunks``."""

    def slice_sent(self, seconds: float, is_cold: bool) -> None:
        """Sending (sendfile) or reading (chunks) one slice took so long; cold: with waiting for the disk."""


@dataclass(slots=True)
class Progress:
    """How far a delivery is, while it runs.

    ``bytes_sent`` counts the package's bytes that were handed to the kernel, ``bytes_acknowledged`` those
    that the other side's kernel has confirmed, as of a second ago at most. ``bytes_written`` is what was
    handed to the transport, where one is used; it may hold some of that back.
    """

    bytes_written: int = 0
    bytes_sent: int = 0
    bytes_acknowledged: int = 0


@dataclass(frozen=True, slots=True)
class Delivery:
    """One response body, ended.

    ``outcome`` is ``completed`` (the other side has acknowledged every byte), ``aborted`` (by the client, or
    at shutdown), ``failed`` (the package could not be read) or ``changed`` (it was written to meanwhile);
    ``reason`` says more where it is not completed. ``method``: ``sendfile`` or ``chunks``. ``first_byte_at``
    is when the headers were out, by ``time.perf_counter``; None: never.
    """

    outcome: str
    reason: str | None
    method: str
    bytes_sent: int
    bytes_acknowledged: int
    first_byte_at: float | None
    duration_seconds: float

    @property
    def failure(self) -> str | None:
        """One of ``FAILURES``, or None where it is completed."""
        match self.outcome:
            case "completed":
                return None
            case "failed":
                return "unreadable"
            case "changed":
                return "changed"
        # Every other reason is in the system's words for a connection that the client ended.
        return _ABORTS.get(self.reason or "", "client_disconnected")


_ABORTS = {"stalled": "stalled", "too slow": "too_slow", "shutdown": "shutdown"}
