"""The embedded server lives as long as its last user."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import psycopg2
import pytest

from exportd.db.embedded import EmbeddedServerError, embedded_server
from tests.support.postgres import query

HOLD = (
    "import sys; from pathlib import Path; from exportd.db.embedded import embedded_server\n"
    "with embedded_server(Path(sys.argv[1])) as dsn:\n"
    "    print(dsn, flush=True); sys.stdin.readline()\n"
)


def start(data_dir: Path) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, data_dir], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def is_up(dsn: str) -> bool:
    try:
        return query(dsn, "SELECT 1") == [(1,)]
    except psycopg2.OperationalError:
        return False


def leave(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=60)
    assert process.returncode == 0


def test_processes_share_one_server_and_the_last_stops_it(tmp_path: Path) -> None:
    first, dsn = start(tmp_path)
    second, second_dsn = start(tmp_path)
    assert dsn == second_dsn
    leave(first)
    assert is_up(dsn)
    leave(second)
    assert not is_up(dsn)


def test_a_killed_process_does_not_keep_the_server_up(tmp_path: Path) -> None:
    killed, dsn = start(tmp_path)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    with embedded_server(tmp_path) as again:
        assert again == dsn
        assert is_up(dsn)
    assert not is_up(dsn)
    with embedded_server(tmp_path) as again:
        assert is_up(again)
    assert not is_up(dsn)


def test_only_its_owner_can_enter_the_folder(tmp_path: Path) -> None:
    with embedded_server(tmp_path) as dsn:
        assert stat.S_IMODE((tmp_path / "postgres").stat().st_mode) == 0o700
        assert query(dsn, "SHOW listen_addresses") == [("",)]


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(EmbeddedServerError, match="too long"),
        embedded_server(tmp_path / ("x" * 100)),
    ):
        pass


def test_a_data_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(EmbeddedServerError, match="the data folder cannot be used"),
        embedded_server(tmp_path / "file"),
    ):
        pass


def test_a_broken_database_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "PG_VERSION").write_text("9\n")
    with pytest.raises(EmbeddedServerError, match="did not start"), embedded_server(tmp_path):
        pass


def test_the_environment_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/elsewhere")
    with embedded_server(tmp_path):
        assert os.environ["XDG_RUNTIME_DIR"] == "/run/elsewhere"


def test_a_server_that_is_gone_at_the_end_is_no_failure(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("g")
    with embedded_server(folder):
        pid = int((folder / "postgres" / "postmaster.pid").read_text().split()[0])
        process = psutil.Process(pid)
        process.send_signal(signal.SIGINT)
        process.wait(60)
        # It goes between the look whether it runs and the signal.
        monkeypatch.setattr(psutil.Process, "is_running", lambda _: True)
