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
from exportd.db.pool import Database, Session
from exportd.domain.delivery import DownloadEvent, Outcome

# A statement of its own, because the next one must see rows that were committed while this one waited. The
# order prevents deadlocks between daemons.
_LOCK_JOBS = """
SELECT job_id, package_sha256::text
  FROM export_jobs
 WHERE job_id = ANY (%(job_ids)s::uuid[])
 ORDER BY job_id
   FOR NO KEY UPDATE;
"""
# A process that dies in the transaction must not hold the locks.
_LOCK_JOBS_IN_TRANSACTION = "SET LOCAL idle_in_transaction_session_timeout = '5s';" + _LOCK_JOBS

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
WITH given AS (
    SELECT * FROM json_to_recordset(%(events)s) AS given({EVENT_COLUMNS})
), ended AS (
    DELETE FROM exportd_running AS running USING given WHERE running.event_id = given.event_id
), recorded AS (
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

_FIND_EVENTS = f"""
SELECT {EVENT_NAMES}, is_judged
  FROM download_events
 WHERE event_id = ANY (%s::uuid[])
"""

_FIND_PROGRESS = """
SELECT job_id, user_id, package_size_bytes, package_sha256, received, tails, resumes
  FROM download_progress
 WHERE (job_id, user_id) IN (SELECT * FROM unnest(%s::uuid[], %s::text[]))
"""

_RECORD_JUDGED = f"""
WITH given AS (
    SELECT * FROM json_to_recordset(%(events)s) AS given({EVENT_COLUMNS}, is_judged boolean)
), ended AS (
    DELETE FROM exportd_running WHERE event_id = ANY (%(event_ids)s::uuid[])
), recorded AS (
    INSERT INTO download_events ({EVENT_NAMES}, is_judged)
    SELECT {EVENT_NAMES}, is_judged
      FROM given
     ORDER BY event_id
    -- It was recorded as lost, or while the job had no row.
    ON CONFLICT (event_id) DO UPDATE
       SET duration_seconds = excluded.duration_seconds, outcome = excluded.outcome,
           received = excluded.received, bytes_sent = excluded.bytes_sent,
           bytes_acknowledged = excluded.bytes_acknowledged, reason = excluded.reason,
           method = excluded.method, is_judged = excluded.is_judged
), progressed AS (
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
    locked = await session.fetch_all(_LOCK_JOBS_IN_TRANSACTION, {"job_ids": _job_ids(events)})
    digests = {row.job_id: row.package_sha256 or "" for row in locked}
    event_ids = [event.event_id for event in events]
    known = {
        row.event_id: (event_of_row(row), row.is_judged)
        for row in await session.fetch_all(_FIND_EVENTS, (event_ids,))
    }
    lost = {
        event_id: event
        for event_id, (event, is_judged) in known.items()
        if is_judged and event.outcome is Outcome.LOST
    }
    recorded = {event_id for event_id, (_, is_judged) in known.items() if is_judged}
    events = [
        event
        for event in events
        if event.event_id not in recorded or (event.event_id in lost and event.outcome is not Outcome.LOST)
    ]
    judged: dict[_Key, list[DownloadEvent]] = defaultdict(list)
    for event in events:
        if event.job_id in digests:
            digest = event.package_sha256 or digests[event.job_id]
            judged[event.job_id, event.user_id, event.package_size_bytes, digest].append(event)
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
        # Even if the event is recorded already: a checkpoint may have been written late.
        "event_ids": event_ids,
        "events": to_json({**to_row(event), "is_judged": event.job_id in digests} for event in events),
        "progress": to_json(progress),
        "completed": to_json(completed),
        "counts": to_json({"job_id": job_id, **asdict(count)} for job_id, count in counts.items()),
    }
    await session.fetch_all(_RECORD_JUDGED, parameters)


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
