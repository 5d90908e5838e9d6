"""The indexes on ``export_jobs``. They are built while the table is used: it may be large, and the
application's own."""

import contextlib

from exportd.db.blocking import connect_blocking

# By name, what follows the table's name.
INDEXES = {
    "exportd_jobs_by_user": "(user_id, created_at, job_id)",
    "exportd_jobs_by_time": "(created_at, job_id)",
    "exportd_jobs_by_status": "(status, created_at, job_id)",
    "exportd_jobs_to_expire": "(package_expires_at, job_id) WHERE package_path IS NOT NULL",
    "exportd_jobs_by_path": "(package_path) WHERE package_path IS NOT NULL",
    "exportd_jobs_to_pack": "(created_at, job_id) WHERE pack_source IS NOT NULL AND completed_at IS NULL",
    "exportd_jobs_re_exports": "(re_export_of) WHERE re_export_of IS NOT NULL",
}

# An index whose building was interrupted is not valid.
_LIST_INDEXES = """
SELECT relname, indisvalid
  FROM pg_index
  JOIN pg_class ON pg_class.oid = indexrelid
 WHERE indrelid = 'export_jobs'::regclass
"""


def build_indexes(dsn: str) -> list[str]:
    """Builds the missing indexes without blocking readers and writers, and returns their names. Builds an
    index again whose building was interrupted.

    Raises psycopg2.Error.
    """
    built = []
    with contextlib.closing(connect_blocking(dsn, is_writing=True)) as connection:
        # CONCURRENTLY does not run in a transaction, so it has only settings of the session. A pooler could
        # give that session to others.
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            if cursor.fetchone() == (connection.info.backend_pid,):
                cursor.execute(
                    "SET statement_timeout = 0; SET lock_timeout = 0; SET default_transaction_read_only = off"
                )
            cursor.execute(_LIST_INDEXES)
            found = dict(cursor.fetchall())
            for name, definition in INDEXES.items():
                if found.get(name):
                    continue
                cursor.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
                cursor.execute(f"CREATE INDEX CONCURRENTLY {name} ON export_jobs {definition}")
                built.append(name)
    return built
