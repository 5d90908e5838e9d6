"""Permission to download: a pure function of principal, job and time.

Permission is decided before readiness and expiry, so that other users learn only that a job exists.
"""

import enum
from datetime import timedelta

from exportd.domain.job import Job, PackageState
from exportd.domain.principal import Principal


class Decision(enum.Enum):
    """The decision on a request for a package."""

    ALLOWED = enum.auto()
    UNAUTHORIZED = enum.auto()
    NOT_READY = enum.auto()
    EXPIRED = enum.auto()
    # Expired, but an unfinished download may be resumed for the grace time.
    RESUMABLE = enum.auto()
    SUSPECT = enum.auto()


def may_see(principal: Principal, creator: str) -> bool:
    """Whether a principal may see a job of that creator."""
    return principal.is_admin or principal.user_id == creator


def decide_download(principal: Principal, job: Job, grace: timedelta) -> Decision:
    """Decides whether a principal may download the job's package, by the database's clock when the job was
    read.

    ``grace`` is how long after the expiry an unfinished download may be resumed.
    """
    if not may_see(principal, job.user_id):
        return Decision.UNAUTHORIZED
    match job.package_state:
        case None:
            return Decision.NOT_READY
        case PackageState.AVAILABLE:
            return Decision.ALLOWED
        case PackageState.SUSPECT:
            return Decision.SUSPECT
        case PackageState.EXPIRED if not job.is_suspect and job.package_expires_at is not None:
            is_over = job.read_at >= job.package_expires_at + grace
            return Decision.EXPIRED if is_over else Decision.RESUMABLE
        case _:
            return Decision.EXPIRED
