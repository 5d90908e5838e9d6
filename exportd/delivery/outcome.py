"""How a delivery went."""

from dataclasses import dataclass


class DeliveryAborted(Exception):
    """The client went away before the last byte. The message says how."""


class PackageUnreadable(Exception):
    """The system refused to read the open package. The message says why."""


@dataclass(slots=True)
class Progress:
    """How far a delivery is. ``bytes_sent`` counts the package's bytes that were handed to the kernel."""

    bytes_sent: int = 0


@dataclass(frozen=True, slots=True)
class Delivery:
    """One response body, ended.

    ``outcome`` is ``completed``, ``aborted`` (by the client, or at shutdown), ``failed`` (the package could
    not be read) or ``changed`` (it was written to meanwhile); ``reason`` says more where it is not completed.
    ``method``: ``sendfile`` or ``chunks``.
    """

    outcome: str
    reason: str | None
    method: str
    bytes_sent: int
    duration_seconds: float
