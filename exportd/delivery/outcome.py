"""How a delivery went."""

from dataclasses import dataclass


class DeliveryAborted(Exception):
    """The client went away before the last byte. The message says how."""


class PackageDamaged(Exception):
    """The open package cannot be read as far as was promised. The message says where."""


@dataclass(slots=True)
class Progress:
    """How far a delivery is. ``bytes_sent`` counts body bytes that were handed to the kernel."""

    bytes_sent: int = 0


@dataclass(frozen=True, slots=True)
class Delivery:
    """One response body, ended.

    ``outcome`` is ``completed``, ``aborted`` (by the client, or at shutdown) or ``failed`` (the package could
    not be read); ``reason`` says more where it is not completed. ``method``: ``sendfile`` or ``chunks``.
    """

    outcome: str
    reason: str | None
    method: str
    bytes_sent: int
    duration_seconds: float
