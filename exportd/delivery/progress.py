"""The progress of a running delivery, and the errors that end it early."""

from dataclasses import dataclass
from typing import Protocol


class DeliveryAborted(Exception):
    """The delivery ended before the last byte. The message says why."""


class PackageUnreadable(Exception):
    """The system could not read the open package. The message says why."""


class Observer(Protocol):
    """Called during deliveries, slice by slice. It must be cheap."""

    def bytes_sent(self, method: str, count: int) -> None:
        """The kernel has taken that many bytes of a package."""

    def slice_sent(self, seconds: float, is_cold: bool) -> None:
        """Sending (sendfile) or reading (chunks) a slice took that long. Cold: it included waiting for the
        disk."""


@dataclass(slots=True)
class Progress:
    """The progress of a running delivery, in bytes of the package.

    The kernel has taken ``bytes_sent``. The client's kernel has confirmed ``bytes_acknowledged``, which is a
    second old at most. ``bytes_written`` were written to the transport, which may still hold some.
    """

    bytes_written: int = 0
    bytes_sent: int = 0
    bytes_acknowledged: int = 0
