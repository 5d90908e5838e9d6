"""The rights that docs/deployment.md gives to the daemon's role are enough."""

import re
from pathlib import Path

import psycopg2
import pytest

from tests.integration.test_faults import count_of
from tests.integration.test_main_job import get, path_of
from tests.support.application import ANN, BASE
from tests.support.daemon import Exportd
from tests.support.postgres import query

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "deployment.md"


@pytest.mark.fresh_database
def test_every_command_works_with_the_documented_rights(exportd: Exportd, source: Path) -> None:
    ((name,),) = query(exportd.dsn, "SELECT current_database()")
    (statements,) = re.findall(r"## The database's role.*?```sql\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    # Roles belong to the whole server, and other tests use it.
    role = f"exportd_{name}"
    query(exportd.dsn, re.sub(r"\b(ROLE|TO) exportd\b", rf"\1 {role}", statements))
    exportd.environ["EXPORTD_DATABASE__DSN"] = psycopg2.extensions.make_dsn(exportd.dsn, user=role)
    try:
        published = exportd.publish(source)
        daemon = exportd.serve()
        status, body = get(daemon, path_of(published, "download"), ANN)
        assert (status, len(body)) == (200, published["packageSizeBytes"])
        for path in (path_of(published, "download-stats"), BASE):
            assert get(daemon, path, ANN)[0] == 200
        assert daemon.stop() == 0
        for command in ("stats", "verify --all", "cleanup", "migrate status", "migrate check"):
            done = exportd.call(*command.split())
            assert done.returncode == 0, done.stderr
        query(exportd.dsn, "UPDATE export_jobs SET package_expires_at = now() - interval '1 day'")
        assert exportd.call("cleanup").returncode == 0
        assert not list(exportd.storage.glob("*.tar.gz"))
        assert count_of(exportd.dsn, published["jobId"]) == 1
    finally:
        exportd.close()
        query(exportd.dsn, f"DROP OWNED BY {role}; DROP ROLE {role}")
