"""Download links in SQL. The database holds the SHA-256 of a link's ticket, never the ticket itself."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from exportd.db.pool import Database
from exportd.db.rows import read
from exportd.domain.job import Job
from exportd.domain.principal import Principal
from exportd.settings import LinkSettings

# Of one user to one package. A further link replaces the oldest one.
_MAX_LINKS = 100

# Idempotent: a retry after a lost connection inserts nothing and reads the row back.
MAKE_LINK = """
WITH surplus AS (
    DELETE FROM exportd_download_links
     WHERE ticket_sha256 IN (
               SELECT ticket_sha256
                 FROM exportd_download_links
                WHERE job_id = %(job_id)s AND user_id = %(user_id)s AND ticket_sha256 <> %(ticket_sha256)s
                ORDER BY created_at DESC, ticket_sha256
               OFFSET %(max_others)s
           )
), inserted AS (
    INSERT INTO exportd_download_links (
        ticket_sha256, job_id, user_id, is_admin, package_sha256, start_until, resume_until
    )
    VALUES (
        %(ticket_sha256)s, %(job_id)s, %(user_id)s, %(is_admin)s, %(package_sha256)s,
        now() + make_interval(secs => %(start_seconds)s), now() + make_interval(secs => %(resume_seconds)s)
    )
    ON CONFLICT (ticket_sha256) DO NOTHING
    RETURNING start_until, resume_until
)
SELECT start_until, resume_until FROM inserted
UNION ALL
SELECT start_until, resume_until FROM exportd_download_links WHERE ticket_sha256 = %(ticket_sha256)s
LIMIT 1
"""

FIND_LINK = """
SELECT ticket_sha256, job_id, user_id, is_admin, package_sha256, start_until, resume_until,
       begun_at IS NOT NULL AS is_begun, revoked_at IS NOT NULL AS is_revoked
  FROM exportd_download_links
 WHERE ticket_sha256 = %s
"""

_BEGIN = """
UPDATE exportd_download_links SET begun_at = now() WHERE ticket_sha256 = %s AND begun_at IS NULL
"""

REVOKE_LINKS = """
UPDATE exportd_download_links
   SET revoked_at = now()
 WHERE job_id = %(job_id)s
   AND (%(user_id)s::text IS NULL OR user_id = %(user_id)s)
   AND revoked_at IS NULL
   AND resume_until > now()
RETURNING 1
"""

# Rows outlive their links by a day, so that a late request is told that its link has expired.
PRUNE_LINKS = "DELETE FROM exportd_download_links WHERE resume_until < now() - make_interval(days => 1)"


@dataclass(frozen=True, slots=True)
class Link:
    """A link to a job's package, as it was when the link was made, that downloads as ``user_id``.

    ``is_begun``: a download by the link has started.
    """

    ticket_sha256: bytes
    job_id: UUID
    user_id: str
    is_admin: bool
    package_sha256: str | None
    start_until: datetime
    resume_until: datetime
    is_begun: bool
    is_revoked: bool


async def make_link(
    database: Database,
    ticket_sha256: bytes,
    job: Job,
    principal: Principal,
    settings: LinkSettings,
) -> tuple[datetime, datetime]:
    """Records a link to the job's present package. Returns two times: until when the link can start a
    download, and until when it can resume one.

    Idempotent by ``ticket_sha256``. Raises DatabaseUnavailable.
    """
    row = await database.fetch_one(
        MAKE_LINK,
        {
            "ticket_sha256": ticket_sha256,
            "max_others": _MAX_LINKS - 1,
            "job_id": job.job_id,
            "user_id": principal.user_id,
            "is_admin": principal.is_admin,
            "package_sha256": job.package_sha256,
            "start_seconds": settings.start_seconds,
            "resume_seconds": settings.resume_seconds,
        },
    )
    assert row is not None
    return row.start_until, row.resume_until


async def find_link(database: Database, ticket_sha256: bytes) -> Link | None:
    """Returns the link of the ticket, even if it has expired or was revoked. Raises DatabaseUnavailable."""
    row = await database.fetch_one(FIND_LINK, (ticket_sha256,))
    return read(Link, row, ticket_sha256=ticket_sha256) if row else None


async def mark_begun(database: Database, link: Link) -> None:
    """Records that a download by the link has started, so that it can be resumed.

    Raises DatabaseUnavailable.
    """
    if not link.is_begun:
        await database.fetch_all(_BEGIN, (link.ticket_sha256,))


async def revoke_links(database: Database, job_id: UUID, user_id: str | None) -> int:
    """Revokes the links to a job's package, or only those that a user made. Returns how many.

    Raises DatabaseUnavailable.
    """
    return len(await database.fetch_all(REVOKE_LINKS, {"job_id": job_id, "user_id": user_id}))


async def prune_links(database: Database) -> None:
    """Deletes the rows of links that expired more than a day ago. Raises DatabaseUnavailable."""
    await database.fetch_all(PRUNE_LINKS)
