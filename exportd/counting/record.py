"""Records deliveries that ended, and counts downloads, in SQL.

Each delivery is one event. ``record_downloads`` is idempotent by the event's id. Nearly all deliveries are of
whole packages, and need one statement. Any other delivery is judged by ``counting/rule.py``, in a transaction
that holds the locks of the jobs' rows.

If a job has no row, its events are kept but not judged (see ``counting/upkeep.py``).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from uuid import UUID

from exportd.counting.progress import NO_PROGRESS, Progress
from exportd.counting.rows import EVENT_COLUMNS, EVENT_NAMES, event_of_row, progress_of_row, to_json, to_row
from exportd.counting.rule import fold
from exportd.db.jobs import PACKAGE_SHA256
from exportd.db.pool import Database, Session
from exportd.domain.delivery import DownloadEvent, Outcome

# A statement of its own, because the next one must see rows that were committed while this one waited. The
# order prevents deadlocks between daemons.
_LOCK_JOBS = """
SELECT FROM export_jobs WHERE job_id = ANY (%(job_ids)s::uuid[]) ORDER BY job_id FOR NO KEY UPDATE;
"""

_GIVEN = f"""
WITH given AS (
    SELECT * FROM json_to_recordset(%(events)s) AS given({EVENT_COLUMNS})
), ended AS (
    DELETE FROM exportd_running AS running USING given WHERE running.event_id = given.event_id
)
"""

# An application's own column may be of a smaller type. It then stays at the largest value of that type.
_SUM = """
    least(
        coalesce(job.{column}, 0)::numeric + added.{column},
        CASE pg_typeof(job.{column})
            WHEN 'smallint'::regtype THEN 32767
            WHEN 'integer'::regtype THEN 2147483647
            ELSE 9223372036854775807
        END
    )
"""
_ADD_TO_JOBS = f"""
UPDATE export_jobs AS job
   SET download_count = {_SUM.format(column="download_count")},
       bytes_served = {_SUM.format(column="bytes_served")},
       last_downloaded_at = CASE WHEN added.download_count > 0 THEN now() ELSE job.last_downloaded_at END,
       package_suspect_since = CASE
           WHEN added.is_suspect THEN coalesce(job.package_suspect_since, now())
           ELSE job.package_suspect_since
       END
"""

_RECORD_WHOLE = f"""
{_GIVEN}, recorded AS (
    INSERT INTO download_events ({EVENT_NAMES})
    SELECT {EVENT_NAMES}
      FROM given
     WHERE EXISTS (SELECT FROM export_jobs AS job WHERE job.job_id = given.job_id)
     ORDER BY event_id
    ON CONFLICT (event_id) DO NOTHING
    RETURNING *
), cleared AS (
    DELETE FROM download_progress AS progress
     USING recorded
     WHERE progress.job_id = recorded.job_id AND progress.user_id = recorded.user_id
       AND progress.package_size_bytes = recorded.package_size_bytes
       AND recorded.package_sha256 IN (progress.package_sha256, '')
), counted AS (
    {_ADD_TO_JOBS}
      FROM (
        SELECT job_id, count(*) AS download_count, sum(bytes_sent) AS bytes_served, false AS is_suspect
          FROM recorded
         GROUP BY job_id
      ) AS added
     WHERE job.job_id = added.job_id
)
SELECT event_id FROM recorded
"""

_RECORD_EVENTS = f"""
-- A process that dies in the transaction must not hold the locks.
SET LOCAL idle_in_transaction_session_timeout = '5s';
{_LOCK_JOBS}
{_GIVEN}, recorded AS (
    INSERT INTO download_events ({EVENT_NAMES}, is_judged)
    SELECT {EVENT_NAMES}, EXISTS (SELECT FROM export_jobs AS job WHERE job.job_id = given.job_id)
      FROM given
     ORDER BY event_id
    ON CONFLICT (event_id) DO NOTHING
    RETURNING event_id, job_id, is_judged
)
SELECT event_id, is_judged, {PACKAGE_SHA256} AS job_sha256
  FROM recorded
  LEFT JOIN export_jobs AS job USING (job_id)
"""

_FIND_EVENTS = f"""
SELECT {EVENT_NAMES}, is_judged,
       EXISTS (SELECT FROM export_jobs AS job WHERE job.job_id = event.job_id) AS has_job,
       (SELECT {PACKAGE_SHA256} FROM export_jobs AS job WHERE job.job_id = event.job_id) AS job_sha256
  FROM download_events AS event
 WHERE event_id = ANY (%s::uuid[])
"""

_UPDATE_EVENTS = f"""
UPDATE download_events AS event
   SET duration_seconds = given.duration_seconds, outcome = given.outcome, received = given.received,
       bytes_sent = given.bytes_sent, bytes_acknowledged = given.bytes_acknowledged, reason = given.reason,
       method = given.method,
       is_judged = is_judged OR EXISTS (SELECT FROM export_jobs AS job WHERE job.job_id = given.job_id)
  FROM json_to_recordset(%s) AS given({EVENT_COLUMNS})
 WHERE event.event_id = given.event_id
"""

_FIND_PROGRESS = """
SELECT job_id, user_id, package_size_bytes, package_sha256, received, tails, resumes
  FROM download_progress
 WHERE (job_id, user_id) IN (SELECT * FROM unnest(%s::uuid[], %s::text[]))
"""

_RECORD_PROGRESS = f"""
WITH progressed AS (
    INSERT INTO download_progress (
        job_id, user_id, package_size_bytes, package_sha256, received, tails, resumes
    )
    SELECT *
      FROM json_to_recordset(%(progress)s) AS given(
        job_id uuid, user_id text, package_size_bytes bigint, package_sha256 text, received int8multirange,
        tails jsonb, resumes jsonb
      )
    ON CONFLICT (job_id, user_id, package_size_bytes, package_sha256) DO UPDATE
       SET received = excluded.received, tails = excluded.tails, resumes = excluded.resumes,
           updated_at = now()
), cleared AS (
    DELETE FROM download_progress AS progress
     USING json_to_recordset(%(completed)s) AS given(
        job_id uuid, user_id text, package_size_bytes bigint, package_sha256 text
     )
     WHERE progress.job_id = given.job_id AND progress.user_id = given.user_id
       AND progress.package_size_bytes = given.package_size_bytes
       AND progress.package_sha256 = given.package_sha256
)
{_ADD_TO_JOBS}
  FROM json_to_recordset(%(counts)s) AS added(
    job_id uuid, download_count bigint, bytes_served bigint, is_suspect boolean
  )
 WHERE job.job_id = added.job_id
"""

# Whose progress: of a job, a user, and a package by its size and SHA-256.
_Key = tuple[UUID, str, int, str]


@dataclass(slots=True)
class _Count:
    """What deliveries add to their job."""

    download_count: int = 0
    bytes_served: int = 0
    is_suspect: bool = False

    def add(
        self, downloads: int, deliveries: Iterable[DownloadEvent], lost: Mapping[UUID, DownloadEvent]
    ) -> None:
        self.download_count += downloads
        for delivery in deliveries:
            before = lost.get(delivery.event_id)
            self.bytes_served += delivery.bytes_sent - (before.bytes_sent if before else 0)
            self.is_suspect |= delivery.outcome is Outcome.CHANGED


async def record_downloads(database: Database, events: Sequence[DownloadEvent]) -> None:
    """Records finished deliveries and counts downloads.

    Idempotent by ``event_id``. If the same delivery occurs as lost and with its end, the end is recorded.
    Raises DatabaseError.
    """
    ends = sorted(events, key=lambda event: event.outcome is not Outcome.LOST)
    left = {event.event_id: event for event in ends}
    if left and all(event.is_whole for event in left.values()):
        parameters = {"job_ids": _job_ids(left.values()), "events": to_json(map(to_row, left.values()))}
        for row in await database.fetch_all(_LOCK_JOBS + _RECORD_WHOLE, parameters):
            del left[row.event_id]
    if left:
        async with database.session() as session, session.transaction():
            await _record_by_rule(session, list(left.values()))


async def _record_by_rule(session: Session, events: list[DownloadEvent]) -> None:
    parameters = {"job_ids": _job_ids(events), "events": to_json(map(to_row, events))}
    recorded = {row.event_id: row for row in await session.fetch_all(_RECORD_EVENTS, parameters)}
    digests = {event_id: row.job_sha256 or "" for event_id, row in recorded.items() if row.is_judged}
    lost: dict[UUID, DownloadEvent] = {}
    if known := [event for event in events if event.event_id not in recorded]:
        digests |= await _record_again(session, known, lost)
    judged: dict[_Key, list[DownloadEvent]] = defaultdict(list)
    for event in events:
        if (digest := digests.get(event.event_id)) is not None:
            key = (event.job_id, event.user_id, event.package_size_bytes, event.package_sha256 or digest)
            judged[key].append(event)
    before = await _find_progress(session, judged)
    progress: list[dict[str, object]] = []
    completed: list[dict[str, object]] = []
    counts = {key[0]: _Count() for key in judged}
    for key, deliveries in judged.items():
        old = before.get(key, NO_PROGRESS)
        new, downloads = fold(old, deliveries, lost)
        counts[key[0]].add(downloads, deliveries, lost)
        if new == NO_PROGRESS:
            completed.append(_key_row(key))
        elif new != old:
            progress.append({**_key_row(key), **to_row(new)})
    parameters = {
        "progress": to_json(progress),
        "completed": to_json(completed),
        "counts": to_json({"job_id": job_id, **asdict(count)} for job_id, count in counts.items()),
    }
    await session.fetch_all(_RECORD_PROGRESS, parameters)


async def _record_again(
    session: Session, events: Sequence[DownloadEvent], lost: dict[UUID, DownloadEvent]
) -> dict[UUID, str]:
    """Updates recorded events that are to be judged now: lost ones that ended after all, which it adds to
    ``lost``, and those whose job has got its row. Returns the digests of their jobs' packages."""
    given, digests = {event.event_id: event for event in events}, {}
    for row in await session.fetch_all(_FIND_EVENTS, (list(given),)):
        known, is_end = event_of_row(row), given[row.event_id].outcome is not Outcome.LOST
        if row.is_judged and is_end and known.outcome is Outcome.LOST:
            lost[row.event_id] = known
            digests[row.event_id] = row.job_sha256 or ""
        elif not row.is_judged and row.has_job:
            digests[row.event_id] = row.job_sha256 or ""
    await session.fetch_all(_UPDATE_EVENTS, (to_json(to_row(given[event_id]) for event_id in digests),))
    return digests


async def _find_progress(session: Session, keys: Iterable[_Key]) -> dict[_Key, Progress]:
    principals = [*{(job_id, user_id) for job_id, user_id, _, _ in keys}]
    if not principals:
        return {}
    rows = await session.fetch_all(_FIND_PROGRESS, [list(column) for column in zip(*principals, strict=True)])
    return {
        (row.job_id, row.user_id, row.package_size_bytes, row.package_sha256): progress_of_row(row)
        for row in rows
    }


def _job_ids(events: Iterable[DownloadEvent]) -> list[UUID]:
    return sorted({event.job_id for event in events})


def _key_row(key: _Key) -> dict[str, object]:
    return dict(zip(("job_id", "user_id", "package_size_bytes", "package_sha256"), key, strict=True))
