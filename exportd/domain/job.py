"""What the tables hold, as plain values. Times are aware, in UTC."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Job:
    """A row of export_jobs, as a download needs it. ``is_suspect``: the file changed after completion.

    ``read_at`` is the database's clock at the time of reading: expiry is judged by it, so that nodes whose
    clocks differ agree.
    """

    job_id: UUID
    user_id: str
    status: str
    tool_name: str
    completed_at: datetime | None
    package_path: str | None
    package_size_bytes: int | None
    package_sha256: str | None
    package_expires_at: datetime | None
    is_suspect: bool
    read_at: datetime


@dataclass(frozen=True, slots=True)
class SizeSummary:
    """Whole downloads of packages of one range of sizes: the first, the second, … Throughput is bytes by
    seconds."""

    range_number: int
    downloads: int
    average_duration_seconds: float
    average_bytes_per_second: float


@dataclass(frozen=True, slots=True)
class FailureCount:
    """How many deliveries ended that way, for that reason (empty: none is known)."""

    outcome: str
    reason: str
    count: int


@dataclass(frozen=True, slots=True)
class DeliverySummary:
    """One delivery, for people."""

    job_id: UUID
    user_id: str
    started_at: datetime
    outcome: str
    reason: str | None
    http_status: int
    method: str | None
    bytes_sent: int
    bytes_acknowledged: int
    duration_seconds: float


@dataclass(frozen=True, slots=True)
class DownloadStatistics:
    """The downloads of a job (``user_id``: its creator), or of all where ``job_id`` is None.

    ``unique_users`` is how many completed a delivery; ``recent`` holds the last deliveries, newest first.
    """

    job_id: UUID | None
    user_id: str | None
    download_count: int
    last_downloaded_at: datetime | None
    bytes_served: int
    unique_users: int
    sizes: list[SizeSummary]
    failures: list[FailureCount]
    recent: list[DeliverySummary]


@dataclass(frozen=True, slots=True)
class DownloadEvent:
    """The record of one delivery.

    ``requested`` and ``received`` hold (start, stop) of each part of the package that was asked for, and that
    the client acknowledged. ``outcome`` is one of the delivery's, or ``running`` while it is under way, or
    ``lost`` where its daemon was killed meanwhile. ``http_status`` is the answer's. ``daemon_id`` names the
    process.
    """

    event_id: UUID
    job_id: UUID
    user_id: str
    started_at: datetime
    duration_seconds: float
    outcome: str
    http_status: int
    requested: tuple[tuple[int, int], ...]
    received: tuple[tuple[int, int], ...]
    bytes_sent: int
    package_size_bytes: int
    request_id: str
    bytes_acknowledged: int
    reason: str | None
    method: str | None
    daemon_id: UUID

    @property
    def bytes_requested(self) -> int:
        return sum(stop - start for start, stop in self.requested)

    @property
    def is_whole(self) -> bool:
        """Whether this delivery alone is a download: every byte of the package, to the end of the answer."""
        whole = (0, self.package_size_bytes)
        return self.outcome == "completed" and (self.received == (whole,) or not self.package_size_bytes)
