"""The progress of a running delivery, and what ends it early."""

from dataclasses import dataclass
from typing import Protocol


class DeliveryAborted(Exception):
    """The client went away before the last byte. The message says how."""


class PackageUnreadable(Exception):
    """The system refused to read the open package. The message says why."""


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
