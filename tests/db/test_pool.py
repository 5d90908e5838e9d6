"""Connections die, servers refuse, statements hang: what the pool makes of it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import psycopg2
import pytest

from exportd.db import connections, pool
from exportd.db.pool import Database, DatabaseRefused, DatabaseUnavailable, open_database
from tests.support.postgres import query

# Lets a statement of a test run where the database's own settings would not.
NO_DEFAULTS = "-c default_transaction_read_only=off -c statement_timeout=0 -c lock_timeout=0"

OPTIONS = {
    "pool_min_size": 1,
    "pool_max_size": 3,
    "connect_timeout_seconds": 5.0,
    "statement_timeout_seconds": 5.0,
}


@pytest.fixture
async def database(dsn: str) -> AsyncIterator[Database]:
    database = await open_database(dsn, **OPTIONS)  # type: ignore[arg-type]
    yield database
    await database.close()


def kill_connections(dsn: str) -> int:
    rows = query(
        dsn,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'exportd'",
    )
    return len(rows)


async def test_rows_come_back(database: Database) -> None:
    assert await database.fetch_all("SELECT * FROM (VALUES (1, 'a'), (2, 'b')) AS v ORDER BY 1") == [
        (1, "a"),
        (2, "b"),
    ]
    assert await database.fetch_one("SELECT %s::integer", (7,)) == (7,)
    assert await database.fetch_one("SELECT 1 WHERE false") is None
    assert await database.fetch_all("SET application_name = 'exportd'") == []


async def test_connections_that_died_are_replaced(database: Database, dsn: str) -> None:
    await asyncio.gather(*(database.fetch_one("SELECT pg_sleep(0.2)") for _ in range(3)))
    assert kill_connections(dsn) == 3
    for _ in range(4):
        assert await database.fetch_one("SELECT 1") == (1,)


@pytest.mark.fresh_database
async def test_a_statement_whose_connection_dies_under_it_is_sent_again(database: Database, dsn: str) -> None:
    query(dsn, "CREATE TABLE gate ()")
    with psycopg2.connect(dsn) as blocker:
        blocker.cursor().execute("LOCK TABLE gate")
        waiting = asyncio.create_task(
            database.fetch_all("SELECT 'through' FROM gate UNION ALL SELECT 'through'")
        )
        while not query(dsn, "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"):
            await asyncio.sleep(0)
        kill_connections(dsn)
    blocker.close()
    assert await waiting == [("through",)]


@pytest.mark.fresh_database
async def test_a_database_that_refuses_is_unavailable_and_comes_back(
    database: Database, dsn: str, server_dsn: str
) -> None:
    name = psycopg2.extensions.parse_dsn(dsn)["dbname"]
    query(server_dsn, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    query(server_dsn, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
    with pytest.raises(DatabaseUnavailable, match="not currently accepting connections"):
        await database.fetch_one("SELECT 1")
    query(server_dsn, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    assert await database.fetch_one("SELECT 1") == (1,)


async def test_a_statement_that_hangs_is_unavailable_in_time(dsn: str) -> None:
    database = await open_database(dsn, **{**OPTIONS, "statement_timeout_seconds": 0.1})  # type: ignore[arg-type]
    with pytest.raises(DatabaseUnavailable, match="in time"):
        await database.fetch_one("SELECT pg_sleep(60)")
    assert await database.fetch_one("SELECT 1") == (1,)
    await database.close()


async def test_the_servers_own_limit_is_no_cancellation(database: Database) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda *_: None)  # aiopg reports it there as well
    with pytest.raises(DatabaseUnavailable, match="cancelled the statement"):
        await database.fetch_one("SET LOCAL statement_timeout = 50; SELECT pg_sleep(60)")


async def test_a_cancelled_caller_is_cancelled(database: Database) -> None:
    task = asyncio.create_task(database.fetch_one("SELECT pg_sleep(60)"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await database.fetch_one("SELECT 1") == (1,)


async def test_a_pool_that_is_used_up_is_unavailable_in_time(dsn: str) -> None:
    options = {**OPTIONS, "pool_max_size": 1, "connect_timeout_seconds": 0.2}
    database = await open_database(dsn, **options)  # type: ignore[arg-type]
    holding = asyncio.create_task(database.fetch_one("SELECT pg_sleep(2)"))
    await asyncio.sleep(0)
    with pytest.raises(DatabaseUnavailable, match="in time"):
        await database.fetch_one("SELECT 1")
    await holding
    await database.close()


async def test_a_wrong_statement_is_a_defect_not_an_outage(database: Database) -> None:
    with pytest.raises(DatabaseRefused, match='relation "nowhere" does not exist'):
        await database.fetch_one("SELECT * FROM nowhere")
    assert await database.fetch_one("SELECT 1") == (1,)


async def test_opening_an_unreachable_database_fails(tmp_path: Path) -> None:
    with pytest.raises(DatabaseUnavailable, match="No such file or directory"):
        await open_database(f"host={tmp_path} dbname=x", **OPTIONS)  # type: ignore[arg-type]


async def test_closing_does_not_wait_for_a_statement_that_never_ends(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_CLOSING_SECONDS", 0.2)
    database = await open_database(dsn, **OPTIONS)  # type: ignore[arg-type]
    stuck = asyncio.create_task(database.fetch_one("SELECT pg_sleep(3600)"))
    sleeping = "SELECT count(*) FROM pg_stat_activity WHERE query ~ 'SELECT pg_sleep.3600.$'"
    while query(dsn, sleeping) == [(0,)]:
        await asyncio.sleep(0.01)
    async with asyncio.timeout(10):
        await database.close()
    stuck.cancel()
    await asyncio.gather(stuck, return_exceptions=True)


@pytest.mark.fresh_database
async def test_a_transaction_is_done_whole_or_not_at_all(database: Database, dsn: str) -> None:
    query(dsn, "CREATE TABLE gate (n integer)")
    async with database.session() as session:
        async with session.transaction():
            await session.fetch_all("INSERT INTO gate VALUES (1)")
            assert query(dsn, "SELECT count(*) FROM gate") == [(0,)]
        assert query(dsn, "SELECT count(*) FROM gate") == [(1,)]
        with pytest.raises(LookupError):
            async with session.transaction():
                await session.fetch_all("INSERT INTO gate VALUES (2)")
                raise LookupError
        assert await session.fetch_one("SELECT count(*) FROM gate") == (1,)


@pytest.mark.fresh_database
async def test_a_refused_statement_takes_its_transaction_back_and_the_session_goes_on(
    database: Database, dsn: str
) -> None:
    query(dsn, "CREATE TABLE gate (n integer)")
    async with database.session() as session:
        with pytest.raises(DatabaseRefused):
            async with session.transaction():
                await session.fetch_all("INSERT INTO gate VALUES (1)")
                await session.fetch_all("SELECT 1/0")
        assert await session.fetch_one("SELECT count(*) FROM gate") == (0,)


async def test_a_lock_is_held_once_until_its_block_ends_or_its_connection_dies(
    database: Database, dsn: str
) -> None:
    async with database.try_lock("cleanup") as is_held:
        assert is_held
        async with database.try_lock("cleanup") as is_also_held:
            assert not is_also_held
        async with database.try_lock("another") as is_other_held:
            assert is_other_held
    async with database.try_lock("cleanup") as is_held_again:
        assert is_held_again
        kill_connections(dsn)
    async with database.try_lock("cleanup") as is_free:
        assert is_free


async def test_a_session_begins_on_a_living_connection(database: Database, dsn: str) -> None:
    await asyncio.gather(*(database.fetch_one("SELECT pg_sleep(0.1)") for _ in range(3)))
    assert kill_connections(dsn) == 3
    async with database.session() as session:
        assert await session.fetch_one("SELECT 7") == (7,)


@pytest.mark.fresh_database
async def test_a_session_whose_connection_dies_is_unavailable_and_repeats_nothing(
    database: Database, dsn: str
) -> None:
    query(dsn, "CREATE TABLE gate (n integer)")
    async with database.session() as session:
        kill_connections(dsn)
        with pytest.raises(DatabaseUnavailable):
            await session.fetch_all("INSERT INTO gate VALUES (1)")
    assert query(dsn, "SELECT count(*) FROM gate") == [(0,)]
    assert await database.fetch_one("SELECT 1") == (1,)


@pytest.mark.parametrize("answer", ["rows", "a closed connection"])
async def test_a_cancellation_that_the_driver_swallows_comes_through(
    database: Database, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    """As Python 3.11's wait_for does where answer and cancellation come together, once in a hundred times."""
    started = asyncio.Event()

    async def swallow(*_: object) -> list[tuple[object, ...]]:
        started.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            if answer == "rows":
                return [(1,)]
            raise psycopg2.InterfaceError("connection already closed") from None
        return []

    async def work() -> None:
        while True:
            await database.fetch_all("SELECT 1")

    monkeypatch.setattr("exportd.db.pool._execute", swallow)
    task = asyncio.create_task(work())
    await started.wait()
    task.cancel()
    await asyncio.wait([task], timeout=10)
    assert task.cancelled()


async def test_a_cancellation_that_comes_with_the_answer_to_begin_leaves_no_transaction_open(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pool._execute

    async def execute(connection: object, statement: str, *rest: object) -> object:
        rows = await real(connection, statement, *rest)  # type: ignore[arg-type]
        if statement.startswith("BEGIN"):
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
        return rows

    monkeypatch.setattr(pool, "_execute", execute)
    async with database.session() as session:

        async def begin() -> None:
            async with session.transaction():
                pytest.fail("it was cancelled")

        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(begin())
        assert session._connection.aiopg.raw.get_transaction_status() == 0


async def test_a_cancelled_task_can_still_clean_up(database: Database) -> None:
    started = asyncio.Event()
    found: list[object] = []

    async def work() -> None:
        try:
            started.set()
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            found.append(await database.fetch_one("SELECT 1"))
            raise

    task = asyncio.create_task(work())
    await started.wait()
    task.cancel()
    await asyncio.wait([task])
    assert found == [(1,)]
    assert task.cancelled()


async def test_a_listener_hears_a_notification_and_waits_no_longer_than_asked(
    database: Database, dsn: str
) -> None:
    async with database.listening("some channel") as wait:
        waiting = asyncio.ensure_future(wait(600))
        await asyncio.sleep(0)
        query(dsn, 'NOTIFY "some channel"')
        async with asyncio.timeout(30):
            await waiting
        await wait(0.01)


@pytest.mark.fresh_database
async def test_settings_of_a_role_or_a_database_do_not_matter(dsn: str) -> None:
    ((name,),) = query(dsn, "SELECT current_database()")
    for setting in (
        "default_transaction_read_only = on",
        "default_transaction_isolation = serializable",
        "statement_timeout = 1",
        "lock_timeout = 1",
        "idle_in_transaction_session_timeout = 1",
    ):
        query(psycopg2.extensions.make_dsn(dsn, options=NO_DEFAULTS), f"ALTER DATABASE {name} SET {setting}")
    show = "SELECT current_setting('transaction_isolation'), pg_sleep(0.05)::text"
    database = await open_database(dsn, **OPTIONS)  # type: ignore[arg-type]
    assert await database.fetch_all("UPDATE export_jobs SET user_id = user_id") == []
    assert await database.fetch_one(show) == ("read committed", "")
    async with database.session() as session, session.transaction():
        await session.fetch_all("UPDATE export_jobs SET user_id = user_id")
        await asyncio.sleep(0.05)
        assert await session.fetch_one(show) == ("read committed", "")
    await database.close()


async def test_nothing_is_left_in_a_session(database: Database, dsn: str) -> None:
    """A pooler gives it to another client."""
    await database.fetch_one("SELECT 1")
    async with database.session() as session, session.transaction():
        await session.fetch_one("SELECT 1")
    left = "COMMIT; SELECT name, setting FROM pg_settings WHERE source = 'session'"
    assert await database.fetch_all(left) == []
