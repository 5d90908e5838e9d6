"""The check of an application's own ``export_jobs``: whether every statement of exportd works on it.

Each problem is one line, with the reason and the statement that cures it.
"""

from dataclasses import dataclass
from typing import Any

import psycopg2

from exportd.db.blocking import blocking_cursor
from exportd.db.connections import WITHOUT_LIMITS

_TEXT = ("text", "character varying")
_NUMBER = ("bigint", "integer", "smallint")
_TIME = ("timestamp with time zone", "timestamp without time zone")


@dataclass(frozen=True, slots=True)
class _Use:
    """The types that a column may have, the usual one first. exportd casts every value, and a value that
    cannot be cast would fail a whole statement."""

    types: tuple[str, ...]
    # exportd sets it to null.
    is_nulled: bool = False
    is_written: bool = True


COLUMNS = {
    "tool_data": _Use(("jsonb", "json"), is_written=False),
    "created_at": _Use(_TIME, is_written=False),
    "completed_at": _Use(_TIME),
    "package_path": _Use(_TEXT, is_nulled=True),
    "package_size_bytes": _Use(_NUMBER, is_nulled=True),
    "package_sha256": _Use((*_TEXT, "character")),
    "package_retention_days": _Use(_NUMBER),
    "package_expires_at": _Use(_TIME),
    "download_count": _Use(_NUMBER),
    "last_downloaded_at": _Use(_TIME),
    "bytes_served": _Use(_NUMBER),
    "re_export_of": _Use(("uuid",)),
    "package_suspect_since": _Use(_TIME, is_nulled=True),
    "package_deleted_at": _Use(_TIME),
    "failure_reason": _Use(_TEXT, is_nulled=True),
    "pack_source": _Use(_TEXT),
    "pack_percent": _Use(_NUMBER, is_nulled=True),
    "pack_attempts": _Use(_NUMBER),
    "pack_due_at": _Use(_TIME, is_nulled=True),
    "packer_id": _Use(("uuid",), is_nulled=True),
    "packer_seen_at": _Use(_TIME, is_nulled=True),
}

_TRIGGERS = ("exportd_expiry_of_new_jobs", "exportd_expiry_at_completion")

_FIND_TABLE = """
SELECT pg_class.oid, relkind::text, nspname, row_security_active(pg_class.oid), current_user,
       has_table_privilege(pg_class.oid, 'SELECT'), has_table_privilege(pg_class.oid, 'INSERT'),
       has_table_privilege(pg_class.oid, 'UPDATE')
  FROM pg_class
  JOIN pg_namespace ON pg_namespace.oid = relnamespace
 WHERE pg_class.oid = to_regclass('export_jobs')
"""
_FIND_RIGHTS = """
SELECT coalesce(current_schema(), '(none)'), current_user,
       coalesce(has_schema_privilege(current_schema(), 'CREATE'), false),
       coalesce(
           (SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = to_regclass('export_jobs')), true
       )
"""
_FIND_ELSEWHERE = """
SELECT quote_ident(nspname), current_user
  FROM pg_class
  JOIN pg_namespace ON pg_namespace.oid = relnamespace
 WHERE relname = 'export_jobs' AND relkind IN ('r', 'p', 'v', 'm', 'f')
   AND has_schema_privilege(pg_namespace.oid, 'USAGE') AND has_table_privilege(pg_class.oid, 'SELECT')
 ORDER BY 1
"""
# A domain counts as the type below it.
_LIST_COLUMNS = """
SELECT attname, format_type(coalesce(nullif(typbasetype, 0), atttypid), NULL), attnotnull, attgenerated <> ''
  FROM pg_attribute
  JOIN pg_type ON pg_type.oid = atttypid
 WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped
"""
_KINDS = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}
# Looks at some rows, because the daemon asks at every start, and an application writes all in the same way.
_FIND_STATUS = """
SELECT status
  FROM (SELECT status::text FROM export_jobs LIMIT 10000) AS sample
 WHERE lower(status) IN ('pending', 'processing', 'completed', 'failed')
   AND status <> lower(status)
 LIMIT 1
"""
_FIND_ROW = """
SELECT job_id FROM export_jobs WHERE status::text = 'completed' LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED
"""
# What exportd changes in a row, and how it would see that a trigger undid that.
_TRIALS = (
    (
        "a download",
        ["download_count = coalesce(download_count, 0) + 1", "last_downloaded_at = now()"],
        "true",
    ),
    (
        "that a package is deleted",
        ["package_path = NULL", "package_size_bytes = NULL", "package_deleted_at = now()"],
        "package_path IS NULL",
    ),
)


def find_problems(dsn: str, *, is_migrating: bool) -> list[str]:
    """Returns why exportd cannot use the table ``export_jobs``; empty if it can, or if there is no table.

    ``is_migrating``: whether the role must be able to change the schema. Changes nothing: what is tried on a
    row is rolled back. Raises psycopg2.Error.
    """
    with blocking_cursor(dsn, is_writing=True) as cursor:
        cursor.execute(WITHOUT_LIMITS + _FIND_TABLE)
        table = cursor.fetchone()
        if table is None:
            return _find_elsewhere(cursor) or (_find_missing_rights(cursor) if is_migrating else [])
        oid, kind, schema, hides_rows, role, *rights = table
        if kind in _KINDS:
            return [
                f"{schema}.export_jobs is {_KINDS[kind]}; exportd locks and changes rows of the table: "
                f'ALTER ROLE "{role}" SET search_path = <the schema of the table>'
            ]
        problems = _find_missing_rights(cursor) if is_migrating else []
        missing = [name for name, has in zip(("SELECT", "INSERT", "UPDATE"), rights, strict=True) if not has]
        if missing:
            problems.append(
                f"the role {role} lacks rights on export_jobs: "
                f'GRANT {", ".join(missing)} ON {schema}.export_jobs TO "{role}"'
            )
        if hides_rows:
            problems.append(
                f"row level security of export_jobs hides rows from the role {role}, so exportd would delete "
                f'packages that have a job: ALTER ROLE "{role}" BYPASSRLS'
            )
        cursor.execute(_LIST_COLUMNS, (oid,))
        found = cursor.fetchall()
        problems += [problem for column in found for problem in _problems_of_column(*column)]
        names = {name for name, *_ in found}
        if not problems and "status" in names:
            problems += _problems_of_rows(cursor, names)
        return problems


_LIST_OWN = """
SELECT attname
  FROM pg_attribute
 WHERE attrelid = to_regclass('export_jobs') AND attnum > 0 AND NOT attisdropped
UNION ALL
SELECT tgname FROM pg_trigger WHERE tgrelid = to_regclass('export_jobs')
"""


def find_missing(dsn: str) -> list[str]:
    """Returns the columns and triggers that ``migrate up`` made and that the table lacks now, as after it was
    dropped or replaced by another. Raises psycopg2.Error."""
    with blocking_cursor(dsn, is_writing=False) as cursor:
        cursor.execute(_LIST_OWN)
        present = {name for (name,) in cursor.fetchall()}
    return [name for name in (*COLUMNS, *_TRIGGERS) if name not in present]


def _find_elsewhere(cursor: Any) -> list[str]:
    cursor.execute(_FIND_ELSEWHERE)
    return [
        f"export_jobs is in the schema {schema}, where the role {role} does not look: "
        f'ALTER ROLE "{role}" SET search_path = {schema}'
        for schema, role in cursor.fetchall()
    ]


def _find_missing_rights(cursor: Any) -> list[str]:
    cursor.execute(_FIND_RIGHTS)
    schema, role, may_create, owns_table = cursor.fetchone()
    problems = []
    if not may_create:
        problems.append(
            f"the role {role} may not create tables in the schema {schema}: "
            f'GRANT CREATE ON SCHEMA {schema} TO "{role}"'
        )
    if not owns_table:
        problems.append(
            f"the role {role} does not own export_jobs, which gets columns, indexes and triggers: "
            "run this command as the owner of the table"
        )
    return problems


def _problems_of_column(name: str, kind: str, is_not_null: bool, is_generated: bool) -> list[str]:
    if (use := COLUMNS.get(name)) is None:
        return []
    if kind not in use.types:
        return [
            f"{name} is of type {kind}; exportd needs {' or '.join(use.types)}: "
            f"ALTER TABLE export_jobs ALTER COLUMN {name} TYPE {use.types[0]} USING <an expression>"
        ]
    if is_generated and use.is_written:
        return [
            f"{name} is a generated column, and exportd writes it: "
            f"ALTER TABLE export_jobs ALTER COLUMN {name} DROP EXPRESSION"
        ]
    if is_not_null and use.is_nulled:
        return [
            f"{name} may not be null, and exportd sets it to null: "
            f"ALTER TABLE export_jobs ALTER COLUMN {name} DROP NOT NULL"
        ]
    return []


def _problems_of_rows(cursor: Any, names: set[str]) -> list[str]:
    cursor.execute(_FIND_STATUS)
    if status := cursor.fetchone():
        return [
            f"status holds {status[0]!r}, and exportd looks for {status[0].lower()!r}: "
            "write the statuses in lower case"
        ]
    problems = []
    for purpose, all_changes, condition in _TRIALS:
        changes = [change for change in all_changes if change.split()[0] in names]
        is_kept = condition if condition.split()[0] in names else "true"
        if changes and (reason := _try(cursor, changes, is_kept)):
            problems.append(f"export_jobs does not let exportd record {purpose}: {reason}")
    return problems


def _try(cursor: Any, changes: list[str], condition: str) -> str | None:
    """Tries changes on a completed row. Returns why they do not work."""
    cursor.execute("SAVEPOINT trial")
    try:
        # The application must not wait, and a constraint must not be checked later.
        cursor.execute("SET LOCAL lock_timeout = '1s'; SET CONSTRAINTS ALL IMMEDIATE")
        cursor.execute(_FIND_ROW)
        if (row := cursor.fetchone()) is None:
            return None
        cursor.execute(f"UPDATE export_jobs SET {', '.join(changes)} WHERE job_id = %s", row)  # noqa: S608
        cursor.execute(f"SELECT {condition} FROM export_jobs WHERE job_id = %s", row)  # noqa: S608
        return (
            None
            if cursor.fetchone() == (True,)
            else "the row does not keep the change; does a trigger undo it?"
        )
    except psycopg2.Error as error:
        return " ".join((error.diag.message_primary or str(error)).split())
    finally:
        cursor.execute("ROLLBACK TO SAVEPOINT trial")
