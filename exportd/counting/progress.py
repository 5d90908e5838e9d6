"""A principal's progress with a package: one row of ``download_progress``.

It stays small, whatever a client requests: the longest pieces and the newest tails and resumes are kept.
"""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from exportd.counting.intervals import Intervals

MAX_PIECES = 500
MAX_TAILS = 64
MAX_RESUMES = 64


@dataclass(frozen=True, slots=True)
class Resume:
    """A delivery that started behind byte 0, and that no tail explains yet."""

    start: int
    began_at: datetime
    daemon_id: UUID


@dataclass(frozen=True, slots=True)
class Tail:
    """The client of a delivery that broke off received the bytes up to ``known`` and may have received those
    up to ``reach``.

    ``after``: only a later resume shows more. ``daemon_id``: the daemon that was killed, or None.
    """

    known: int
    reach: int
    after: datetime
    daemon_id: UUID | None

    def explains(self, resume: Resume) -> bool:
        return (
            self.known <= resume.start <= self.reach
            and self.after < resume.began_at
            and self.daemon_id != resume.daemon_id
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """The bytes of a package that a principal has, and the evidence that may show more."""

    received: Intervals = ()
    tails: tuple[Tail, ...] = ()
    resumes: tuple[Resume, ...] = ()


NO_PROGRESS = Progress()
