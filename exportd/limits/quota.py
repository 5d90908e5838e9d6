"""The bytes that a principal downloaded in the last day, from every daemon on this database."""

import math

from exportd.counting.running import write_running
from exportd.db.pool import Database, Session
from exportd.domain.delivery import DownloadEvent

# A finished delivery counts its bytes, a running one all that it requested. The statement finds the finished
# delivery, from the newest on, at which the sum reaches the limit: once it is a day old, the user may
# download again.
REACH_QUOTA = """
WITH day AS (
    SELECT started_at, event_id, false AS is_running, bytes_acknowledged AS bytes
      FROM download_events
     WHERE user_id = %(user_id)s AND started_at > now() - interval '1 day'
     UNION ALL
    SELECT started_at, event_id, true,
           (SELECT sum(upper(part) - lower(part)) FROM unnest(requested) AS part)
      FROM exportd_running
     WHERE user_id = %(user_id)s AND started_at > now() - interval '1 day'
)
SELECT coalesce((SELECT sum(bytes) FROM day), 0) >= %(limit)s AS is_reached,
       (
         SELECT extract(epoch FROM started_at + interval '1 day' - now())::double precision
           FROM (
             SELECT started_at, sum(bytes) OVER (ORDER BY started_at DESC, event_id) AS total
               FROM day
              WHERE NOT is_running
           ) AS ended
          WHERE total >= %(limit)s
          ORDER BY started_at DESC
          LIMIT 1
       ) AS seconds
"""
# Held until the end of the transaction, so that of two concurrent starts the second sees the first.
_TAKE_TURNS = "SELECT pg_advisory_xact_lock(hashtextextended('exportd quota ' || %s, 0))"
# The end of a running delivery cannot be foreseen.
_RETRY_SECONDS = 10


async def seconds_until_within_quota(
    database: Database | Session, user_id: str, limit_bytes: int
) -> int | None:
    """Returns None if the deliveries of the last day sum up to less than the limit, or else the seconds until
    they do. Raises DatabaseUnavailable."""
    row = await database.fetch_one(REACH_QUOTA, {"user_id": user_id, "limit": limit_bytes})
    assert row is not None
    if row.seconds is not None:
        return max(1, math.ceil(float(row.seconds)))
    return _RETRY_SECONDS if row.is_reached else None


async def reserve_within_quota(database: Database, event: DownloadEvent, limit_bytes: int) -> int | None:
    """Like ``seconds_until_within_quota``, for a delivery that is about to start. If it may start, records it
    as running, so that every daemon counts it. Raises DatabaseUnavailable."""
    async with database.session() as session, session.transaction():
        await session.fetch_all(_TAKE_TURNS, (event.user_id,))
        seconds = await seconds_until_within_quota(session, event.user_id, limit_bytes)
        if seconds is None:
            await write_running(session, [event])
    return seconds
