"""A connection string that libpq cannot use is refused at once, and no part of it is printed."""

import pytest
from psycopg2.extensions import parse_dsn

from exportd.db.dsn import DsnRefused, check_dsn, complete_dsn
from tests.support.daemon import Exportd

WRONG = {
    "postgresql+asyncpg://u:se-cret@h/db": "begins with postgresql://",
    "postgresql:/u:se-cret@h/db": "begins with postgresql://",
    "mysql://u:se-cret@h/db": "begins with postgresql://",
    "postgresql://u:se-cret%@h/db": "% must be written as %25",
    "postgresql://u:se-cret%zz@h/db": "% must be written as %25",
    "'postgresql://u:se-cret@h/db'": "in quotation marks",
    '"postgresql://u:se-cret@h/db"': "in quotation marks",
    "postgresql://u:x@se-cret@h/db": "@ must be written as %40",
    "postgresql://u:se-cret/x@h/db": "must be written as",
    "postgresql://u:se-cret@h/db?nonsense": "not a valid address",
    "host=h password=x se-cret user=u": "needs quotation marks",
    "host=h password='se-cret user=u": "needs quotation marks",
    "host=h password=x se-cret=1": "needs quotation marks",
    "postgresql://h:54x2/db": "the port is not a number",
    "host=h port=70000": "the port is not a number",
    "host=h,i port=5432,se-cret": "the port is not a number",
    "host=h sslmode=se-cret": "sslmode is not one of",
    "dbname=postgresql://u:se-cret@h/db": "the name of the database is an address",
}


@pytest.mark.parametrize("dsn", WRONG)
def test_a_wrong_connection_string_is_refused_by_its_kind(dsn: str) -> None:
    with pytest.raises(DsnRefused) as refused:
        check_dsn(dsn)
    assert WRONG[dsn] in str(refused.value)
    assert "cret" not in str(refused.value)


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://u:se%40cret%2F%25@h:5432/db",
        "postgres:///db?host=/run/postgresql&sslmode=require",
        "postgresql://h,i:5433,[::1]:5434/db?target_session_attrs=read-write",
        "host=h,i port=5432,5433 user=u password='two words' dbname=d",
        "postgresql://u:se-cret?x@h/db",
        "",
        "dbname=a@b",
    ],
)
def test_a_usable_connection_string_is_accepted(dsn: str) -> None:
    check_dsn(dsn)


@pytest.mark.parametrize("dsn", list(WRONG)[::4])
@pytest.mark.parametrize("command", [("migrate", "status"), ("serve",), ("cleanup",)])
def test_no_command_prints_a_part_of_a_wrong_connection_string(
    exportd: Exportd, dsn: str, command: tuple[str, ...]
) -> None:
    done = exportd.call(*command, EXPORTD_DATABASE__DSN=dsn)
    assert done.returncode == 1
    assert done.stderr.startswith("exportd: database.dsn: ")
    assert "cret" not in done.stdout + done.stderr


def test_a_connection_string_is_completed_and_keeps_what_it_says() -> None:
    fields = parse_dsn(complete_dsn("postgresql://u:p@h/db?keepalives_idle=99&client_encoding=LATIN1"))
    assert (fields["user"], fields["password"], fields["host"], fields["dbname"]) == ("u", "p", "h", "db")
    # A dead connection is noticed within seconds, and texts are UTF-8 whatever the role's settings are.
    assert (fields["keepalives_idle"], fields["tcp_user_timeout"]) == ("99", "5000")
    assert fields["client_encoding"] == "UTF8"
