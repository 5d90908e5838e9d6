"""Statistics of downloads, for people. Times are aware, in UTC."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID


@dataclass(frozen=True, slots=True)
class SizeSummary:
    """Downloads in one delivery, of packages in one range of sizes."""

    range_number: int
    downloads: int
    average_duration_seconds: float
    average_bytes_per_second: float


@dataclass(frozen=True, slots=True)
class FailureCount:
    """The number of deliveries that ended with an outcome for a reason (empty: unknown)."""

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
    """The downloads of a job (``user_id``: its creator), or of all jobs if ``job_id`` is None.

    ``unique_users`` is the number of users who completed a delivery. ``recent`` holds the last deliveries,
    newest first.
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
