"""Who may download what, and when: a pure function of principal, job and the clock.

Permission is decided before readiness and expiry, so that a stranger learns nothing of a job but that it
exists.
"""

import enum
from datetime import datetime, timedelta

from exportd.auth.principal import Principal
from exportd.db.rows import Job


class Decision(enum.Enum):
    """What becomes of a request for a package."""

    ALLOWED = enum.auto()
    UNAUTHORIZED = enum.auto()
    NOT_READY = enum.auto()
    EXPIRED = enum.auto()
    # Past its expiry: who began before may go on for the grace time.
    RESUMABLE = enum.auto()
    SUSPECT = enum.auto()


def may_see(principal: Principal, creator: str) -> bool:
    """Whether a principal may see a job of that creator at all."""
    return principal.is_admin or principal.user_id == creator


def decide_download(principal: Principal, job: Job, now: datetime, grace: timedelta) -> Decision:
    """Whether a principal may download the job's package at ``now``, by the database's clock.

    ``grace`` is how long after the expiry a download may be resumed that began before.
    """
    if not may_see(principal, job.user_id):
        return Decision.UNAUTHORIZED
    if job.status != "completed":
        return Decision.NOT_READY
    # The cleanup sets the path of a deleted package to null.
    if job.package_path is None:
        return Decision.EXPIRED
    expires_at = job.package_expires_at
    if expires_at is not None and now >= expires_at + grace:
        return Decision.EXPIRED
    is_expired = expires_at is not None and now >= expires_at
    if job.is_suspect:
        return Decision.EXPIRED if is_expired else Decision.SUSPECT
    return Decision.RESUMABLE if is_expired else Decision.ALLOWED
