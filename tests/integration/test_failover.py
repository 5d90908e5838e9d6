"""A primary that dies, hangs or becomes a standby, while clients download."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_faults import Load, count_of
from tests.support.application import Jobs, noise
from tests.support.cluster import Server
from tests.support.daemon import Exportd, wait_for
from tests.support.postgres import query


@pytest.fixture
def exportd(tmp_path: Path, server: Server, standby: Server) -> Iterator[Exportd]:
    """With a connection string of both servers, the standby first."""
    dsn = f"host=127.0.0.1,127.0.0.1 port={standby.port},{server.port} user=postgres dbname=postgres"
    command = Exportd(tmp_path, dsn)
    yield command
    command.close()


@pytest.mark.slow
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_promotion_under_load_loses_no_count(
    exportd: Exportd, server: Server, standby: Server, fault: signal.Signals
) -> None:
    exportd.storage.mkdir(parents=True)
    package = Jobs(server.dsn, exportd.storage).add(noise(30_000))
    daemon = exportd.serve()
    load = Load(daemon.port, package, clients=4, in_parts=2)
    wait_for("some downloads", lambda: load.completed > 50)
    server.signal(fault)
    query(standby.dsn, "ALTER SYSTEM SET synchronous_standby_names = ''")
    query(standby.dsn, "SELECT pg_reload_conf()")
    standby.promote()
    before = load.completed
    wait_for("downloads after the promotion", lambda: load.completed > before + 50)
    completed = load.finish()
    assert {status for status, *_ in load.refused} <= {503}
    wait_for("every count", lambda: count_of(standby.dsn, package.job_id) == completed)
    assert daemon.stop() == 0
    assert count_of(standby.dsn, package.job_id) == completed
    assert not daemon.events("request_failed")
    # It starts again with the same string.
    server.kill()
    assert exportd.serve().url
