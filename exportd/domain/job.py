"""Export jobs and their packages, as the tables hold them. Times are aware, in UTC."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from uuid import UUID


class JobStatus(StrEnum):
    """The statuses that exportd knows. An application's own table may hold others."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"


class PackageState(StrEnum):
    """The state of a completed job's package."""

    AVAILABLE = "available"
    EXPIRED = "expired"
    DELETED = "deleted"
    SUSPECT = "suspect"


@dataclass(frozen=True, slots=True)
class Job:
    """The columns of an export_jobs row that a download needs.

    ``is_suspect``: the file changed after completion. ``read_at`` is the database's clock when the row was
    read. Expiry is decided by it, so that nodes whose clocks differ agree.
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

    @property
    def package_state(self) -> PackageState | None:
        """The package's state at ``read_at``; None before the job is completed."""
        if self.status != JobStatus.COMPLETED:
            return None
        # The cleanup sets the path of a deleted package to null.
        if self.package_path is None:
            return PackageState.DELETED
        if self.package_expires_at is not None and self.read_at >= self.package_expires_at:
            return PackageState.EXPIRED
        return PackageState.SUSPECT if self.is_suspect else PackageState.AVAILABLE
