"""What the running daemon logs, and where."""

import http.client
import json
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_main_job import get, path_of
from tests.support.application import ANN
from tests.support.daemon import Exportd, wait_for


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("workers", [1, 2])
def test_the_download_log_survives_logrotate(
    exportd: Exportd,
    source: Path,
    tmp_path: Path,
    workers: int,
) -> None:
    published = exportd.publish(source)
    file = tmp_path / "downloads.log"
    daemon = exportd.serve("--workers", workers, EXPORTD_LOGGING__DOWNLOAD_LOG=str(file))
    get(daemon, path_of(published))
    wait_for("the line", lambda: len(lines_of(file)) == 1)
    file.rename(tmp_path / "downloads.log.1")
    daemon.process.send_signal(signal.SIGHUP)

    def is_reopened() -> bool:
        get(daemon, path_of(published))
        return file.exists() and len(lines_of(file)) >= 2

    wait_for("lines in the new file", is_reopened)
    assert daemon.stop() == 0
    for line in lines_of(file):
        assert (line["event"], line["job_id"]) == ("download_completed", published["jobId"])
    assert stat.S_IMODE(file.stat().st_mode) & 0o007 == 0
    # The main log has them too.
    both = len(lines_of(file)) + len(lines_of(tmp_path / "downloads.log.1"))
    assert len(daemon.events("download_completed")) == both


def test_a_download_log_that_cannot_be_opened_is_told_at_start(exportd: Exportd, tmp_path: Path) -> None:
    done = exportd.call("serve", EXPORTD_LOGGING__DOWNLOAD_LOG=str(tmp_path / "missing" / "log"))
    assert done.returncode == 1
    assert done.stderr == "exportd: logging.download_log: cannot be opened: No such file or directory\n"


def test_a_log_that_nobody_reads_stops_no_download(exportd: Exportd, source: Path) -> None:
    published = exportd.publish(source)
    with socket.create_server(("127.0.0.1", 0)) as opened:
        port = opened.getsockname()[1]
    # A pipe's size is what a reader that sleeps leaves for the daemon's lines: some two hundred downloads.
    daemon = subprocess.Popen(
        [sys.executable, "-m", "exportd", "serve"],
        env={**exportd.environ, "EXPORTD_SERVER__PORT": str(port)},
        stdout=subprocess.PIPE,
    )
    try:
        assert daemon.stdout is not None
        assert b"server_started" in daemon.stdout.readline()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        for _ in range(400):
            connection.request("GET", path_of(published), headers={**ANN, "Range": "bytes=0-1999"})
            assert len(connection.getresponse().read()) == 2000
        connection.close()
    finally:
        daemon.kill()
        daemon.communicate()
