"""How much a principal downloaded in the last day, of every daemon on this database."""

import math

from exportd.db.pool import Database

# Newest first, the delivery at which the sum reaches the limit: once it is a day old, there is room again.
REACH_QUOTA = """
SELECT extract(epoch FROM started_at + interval '1 day' - now())::double precision
  FROM (
    SELECT started_at,
           sum(coalesce(bytes_acknowledged, bytes_sent)) OVER (ORDER BY started_at DESC, event_id) AS total
      FROM download_events
     WHERE user_id = %(user_id)s AND started_at > now() - interval '1 day'
  ) AS day
 WHERE total >= %(limit)s
 ORDER BY started_at DESC
 LIMIT 1
"""


async def seconds_until_within_quota(database: Database, user_id: str, limit_bytes: int) -> int | None:
    """None: the deliveries that began in the last day sum up to less than the limit, those under way counted
    as far as they are written down. Otherwise, for how many seconds not. Raises DatabaseUnavailable."""
    row = await database.fetch_one(REACH_QUOTA, {"user_id": user_id, "limit": limit_bytes})
    return None if row is None else max(1, math.ceil(row[0]))
