"""How a delivery went."""

from dataclasses import dataclass


class DeliveryAborted(Exception):
    """The client went away before the last byte. The message says how."""


class PackageUnreadable(Exception):
    """The system refused to read the open package. The message says why."""


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
    is when the headers were out, by ``time.monotonic``; None: never.
    """

    outcome: str
    reason: str | None
    method: str
    bytes_sent: int
    bytes_acknowledged: int
    first_byte_at: float | None
    duration_seconds: float
