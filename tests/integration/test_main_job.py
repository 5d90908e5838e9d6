"""The main job with the real command: publish a package, serve it, download it."""

import hashlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from click.testing import CliRunner

from exportd.cli.main import cli
from exportd.db import migrate as migrations
from exportd.db.embedded import embedded_server
from exportd.db.migrate import migrate_down
from tests.support.application import ANN, BASE, SECRET, bearer
from tests.support.daemon import Daemon, Exportd, serve_https, wait_for
from tests.support.postgres import query
from tests.support.programs import require


@pytest.fixture
def large_source(tmp_path: Path) -> Path:
    """Larger than what socket buffers hold."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "data.bin").write_bytes(random.Random(2).randbytes(40_000_000))
    return folder


def path_of(published: dict[str, object], leaf: str = "download") -> str:
    return f"{BASE}/{published['jobId']}/{leaf}"


def get(daemon: Daemon, path: str, headers: dict[str, str] = ANN, **options: object) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=60)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    try:
        return response.status, response.read()
    finally:
        connection.close()


def statistics(daemon: Daemon, published: dict[str, object]) -> dict[str, object]:
    body: dict[str, object] = json.loads(get(daemon, path_of(published, "download-stats"))[1])
    return body


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_publish_serve_download_by_curl(exportd: Exportd, source: Path, tmp_path: Path) -> None:
    require("curl")
    daemon = exportd.serve()
    published = exportd.publish(source, "--retention-days", 7)
    assert set(published) == {"jobId", "packagePath", "packageSizeBytes", "sha256", "expiresAt"}
    package = exportd.storage / published["packagePath"]
    assert package.stat().st_size == published["packageSizeBytes"]
    assert query(
        exportd.dsn,
        "SELECT user_id, status, package_retention_days, package_expires_at - completed_at = '7 days'"
        " FROM export_jobs",
    ) == [("ann", "completed", 7, True)]

    token = exportd.call("token", "--user", "ann").stdout.strip()
    target = tmp_path / "downloads"
    target.mkdir()
    curl = ["curl", "-sSf", "-OJ", "-H", f"Authorization: Bearer {token}", daemon.url + path_of(published)]
    subprocess.run(curl, cwd=target, check=True)
    (file,) = target.iterdir()
    assert file.name.startswith("export-form-")
    assert file.read_bytes() == package.read_bytes()
    assert sha256(file.read_bytes()) == published["sha256"]
    wait_for("the count", lambda: statistics(daemon, published)["downloadCount"] == 1)

    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(["tar", "xzf", file, "-C", out], check=True)
    subprocess.run(["diff", "-r", source, out / "export"], check=True)

    ended = daemon.wait_for_event("download_completed")
    assert (ended["user_id"], ended["job_id"], ended["package_size_bytes"]) == (
        "ann", published["jobId"], published["packageSizeBytes"],
    )  # fmt: skip
    assert ended["request_id"]
    assert ended["method"] == "sendfile"
    assert ended["bytes_sent"] == published["packageSizeBytes"]
    assert ended["duration_seconds"] > 0
    assert ended["bytes_per_second"] > 0
    assert daemon.stop() == 0


def test_a_ready_package_is_served_byte_for_byte(exportd: Exportd, source: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready.tar.gz"
    subprocess.run(["tar", "czf", ready, "-C", source.parent, source.name], check=True)
    published = exportd.publish(ready)
    daemon = exportd.serve()
    assert get(daemon, path_of(published)) == (200, ready.read_bytes())


def test_a_client_that_leaves_an_https_download_has_not_got_it(
    exportd: Exportd, source: Path, tmp_path: Path
) -> None:
    published = exportd.publish(source)
    daemon, context = serve_https(exportd, tmp_path)
    plain = socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    plain.connect(("127.0.0.1", daemon.port))
    with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
        request = (
            f"GET {path_of(published)} HTTP/1.1\r\nHost: x\r\nAuthorization: {ANN['Authorization']}\r\n\r\n"
        )
        connection.sendall(request.encode())
        assert connection.recv(10_000).startswith(b"HTTP/1.1 200 ")
    aborted = daemon.wait_for_event("download_aborted")
    assert aborted["bytes_acknowledged"] < aborted["package_size_bytes"]
    assert daemon.stop() == 0
    assert query(exportd.dsn, "SELECT download_count FROM export_jobs") == [(0,)]


def test_https_delivers_in_chunks(exportd: Exportd, source: Path, tmp_path: Path) -> None:
    published = exportd.publish(source)
    daemon, context = serve_https(exportd, tmp_path)
    assert daemon.url.startswith("https://")
    connection = http.client.HTTPSConnection("127.0.0.1", daemon.port, context=context)
    connection.request("GET", path_of(published), headers=ANN)
    assert sha256(connection.getresponse().read()) == published["sha256"]
    connection.request("GET", path_of(published, "download-stats"), headers=ANN)
    assert json.loads(connection.getresponse().read())["downloadCount"] == 1
    connection.close()
    # A client that asks for nothing more must not have to, for its download to end and be counted.
    url = daemon.url + path_of(published)
    curl = ["curl", "-sSfk", "-o", str(tmp_path / "out"), "-H", f"Authorization: {ANN['Authorization']}"]
    more: list[list[str]] = [[], ["-H", "Connection: close"]]
    for options in more:
        subprocess.run([*curl, *options, "-m", "30", url], check=True)
        assert sha256((tmp_path / "out").read_bytes()) == published["sha256"]
    assert daemon.stop() == 0
    assert [line["method"] for line in daemon.events("download_completed")] == ["chunks"] * 3
    assert not daemon.events("download_aborted")
    assert query(exportd.dsn, "SELECT download_count FROM export_jobs") == [(3,)]


@pytest.mark.parametrize(
    "authorization",
    [b"Bearer \xff\xfe.\xff.\xff", b"Bearer eyJhbGciOiJIUzI1NiIsImNyaXQiOlsiXHVkODAwIl19.e30.AAAA", b"\xff"],
)
def test_no_token_causes_a_500_or_logs_the_secret(exportd: Exportd, authorization: bytes) -> None:
    daemon = exportd.serve()
    path = path_of({"jobId": str(uuid.uuid4())})
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=30) as connection:
        head = b"GET %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: %b\r\n\r\n"
        connection.sendall(head % (path.encode(), authorization))
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert daemon.stop() == 0
    assert daemon.events("authentication_failed")
    assert SECRET not in json.dumps(daemon.log)


def test_two_publishes_and_a_daemon_share_one_embedded_database(
    tmp_path_factory: pytest.TempPathFactory, source: Path
) -> None:
    exportd = Exportd(tmp_path_factory.mktemp("e"), dsn="")
    try:
        daemon = exportd.serve()
        assert daemon.url
        found: list[dict[str, object]] = []

        def publish() -> None:
            done = exportd.run("publish", source, "--user", "ann", "--tool", "Form")
            found.append(json.loads(done.stdout))

        threads = [threading.Thread(target=publish) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 2
        for published in found:
            status, body = get(daemon, path_of(published))
            assert (status, sha256(body)) == (200, published["sha256"])
            wait_for("the count", lambda one=published: statistics(daemon, one)["downloadCount"] == 1)
        assert daemon.stop() == 0
        # The last one out stopped the server.
        assert not (exportd.folder / "data" / "postgres" / "postmaster.pid").exists()
    finally:
        exportd.close()


class SlowDownload:
    """A client that has read the first bytes of a large package, and reads the rest when told."""

    def __init__(self, daemon: Daemon, published: dict[str, object]) -> None:
        self.connection = socket.create_connection(("127.0.0.1", daemon.port))
        fields = {"Host": "x", **ANN}
        lines = [
            f"GET {path_of(published)} HTTP/1.1",
            *(f"{name}: {value}" for name, value in fields.items()),
        ]
        self.connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        self.received = self.connection.recv(1000)

    def finish(self) -> bytes:
        try:
            while data := self.connection.recv(1 << 20):
                self.received += data
        except ConnectionResetError:
            pass
        self.connection.close()
        return self.received.partition(b"\r\n\r\n")[2]


def test_sigterm_lets_running_downloads_finish(exportd: Exportd, large_source: Path) -> None:
    published = exportd.publish(large_source)
    daemon = exportd.serve()
    idle = http.client.HTTPConnection("127.0.0.1", daemon.port)
    idle.request("GET", "/readyz")
    assert idle.getresponse().read()
    slow, slower = SlowDownload(daemon, published), SlowDownload(daemon, published)
    port = daemon.port
    daemon.process.send_signal(signal.SIGTERM)
    daemon.wait_for_event("server_draining")

    # Nothing new is accepted, and what is open already is told to go elsewhere.
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    idle.request("GET", path_of(published), headers=ANN)
    response = idle.getresponse()
    assert (response.status, json.loads(response.read())["code"]) == (503, "SHUTTING_DOWN")
    assert response.getheader("Retry-After")
    assert response.getheader("Connection") == "close"
    idle.close()

    # Both read to the connection's end, which for the first comes while the second is under way.
    assert sha256(slow.finish()) == published["sha256"]
    assert sha256(slower.finish()) == published["sha256"]
    assert daemon.process.wait(60) == 0
    assert query(exportd.dsn, "SELECT download_count FROM export_jobs") == [(2,)]


def test_readiness_ends_with_sigterm(exportd: Exportd, large_source: Path) -> None:
    published = exportd.publish(large_source)
    daemon = exportd.serve()
    probe = http.client.HTTPConnection("127.0.0.1", daemon.port)
    probe.request("GET", "/readyz")
    response = probe.getresponse()
    assert (response.status, json.loads(response.read())["status"]) == (200, "ok")
    slow = SlowDownload(daemon, published)
    daemon.process.send_signal(signal.SIGTERM)
    daemon.wait_for_event("server_draining")
    probe.request("GET", "/readyz")
    response = probe.getresponse()
    assert (response.status, json.loads(response.read())["status"]) == (503, "draining")
    probe.close()
    slow.finish()
    assert daemon.process.wait(60) == 0


def test_a_drain_is_bounded_and_says_what_it_cut(exportd: Exportd, large_source: Path) -> None:
    published = exportd.publish(large_source)
    daemon = exportd.serve(EXPORTD_SERVER__DRAIN_TIMEOUT_SECONDS="0.2")
    slow = SlowDownload(daemon, published)
    assert daemon.stop() == 0
    assert len(slow.finish()) < published["packageSizeBytes"]
    assert daemon.events("server_stopped")[0]["requests_aborted"] == 1
    assert query(exportd.dsn, "SELECT outcome FROM download_events") == [("aborted",)]
    assert query(exportd.dsn, "SELECT download_count FROM export_jobs") == [(0,)]


def test_a_second_signal_ends_at_once(exportd: Exportd, large_source: Path) -> None:
    published = exportd.publish(large_source)
    daemon = exportd.serve(EXPORTD_SERVER__DRAIN_TIMEOUT_SECONDS="600")
    slow = SlowDownload(daemon, published)
    daemon.process.send_signal(signal.SIGTERM)
    daemon.wait_for_event("server_draining")
    assert daemon.stop() == 1
    assert len(slow.finish()) < published["packageSizeBytes"]
    assert query(exportd.dsn, "SELECT outcome FROM download_events") == [("aborted",)]


def failure_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a failed command."""
    assert done.returncode not in (0, -signal.SIGABRT, -signal.SIGSEGV)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    return line


def test_serve_refuses_what_it_cannot_do_in_one_line(exportd: Exportd, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert failure_of(exportd.run("serve", "--port", port)) == (
            f"exportd: cannot listen on 127.0.0.1:{port}: Address already in use"
        )
    assert "server.prot: unknown key" in failure_of(exportd.call("serve", EXPORTD_SERVER__PROT="1"))
    assert "auth.secret: must be at least 32 bytes" in failure_of(
        exportd.call("serve", EXPORTD_AUTH__SECRET="12345678")
    )
    assert "nowhere.toml does not exist" in failure_of(exportd.call("serve", "--config", "nowhere.toml"))
    (tmp_path / "junk.pem").write_text("junk")
    pem = str(tmp_path / "junk.pem")
    assert "certificate or key cannot be used" in failure_of(
        exportd.call("serve", EXPORTD_SERVER__TLS_CERT=pem, EXPORTD_SERVER__TLS_KEY=pem)
    )
    (tmp_path / "file").touch()
    assert "Not a directory" in failure_of(
        exportd.call("serve", EXPORTD_STORAGE__ROOT=str(tmp_path / "file" / "x"))
    )


def test_every_wrong_setting_is_told_at_once(exportd: Exportd) -> None:
    done = exportd.call(
        "serve", EXPORTD_SERVER__PROT="1", EXPORTD_SERVER__PORT="x", EXPORTD_AUTH__SECRET="short"
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 3


def test_a_database_that_is_not_migrated_is_refused(exportd: Exportd, empty_dsn: str) -> None:
    done = exportd.call("serve", EXPORTD_DATABASE__DSN=empty_dsn)
    assert "run `exportd migrate up`" in failure_of(done)


def test_migrate_says_what_it_did(exportd: Exportd, empty_dsn: str) -> None:
    def migrate(direction: str) -> list[str]:
        done = exportd.call("migrate", direction, EXPORTD_DATABASE__DSN=empty_dsn)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    folder = Path(migrations.__file__).parent / "migrations"
    names = sorted(path.stem for path in folder.glob("*.sql") if not path.stem.endswith(".rollback"))
    assert names[0] == "0001.export-jobs"
    assert migrate("status") == [f"pending  {name}" for name in names]
    assert migrate("up") == [f"applied {name}" for name in names]
    assert migrate("up") == ["nothing to apply"]
    assert migrate("status") == [f"applied  {name}" for name in names]
    assert migrate("down") == [f"took back {names[-1]}"]
    assert migrate("status")[-2:] == [f"applied  {names[-2]}", f"pending  {names[-1]}"]
    while migrate_down(empty_dsn):
        pass
    assert migrate("down") == ["nothing to take back"]


def test_a_database_that_refuses_the_password_is_told_in_one_line(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("p")
    with embedded_server(folder) as dsn:
        query(dsn, "CREATE ROLE guarded LOGIN PASSWORD 'right'")
        hba = folder / "postgres" / "pg_hba.conf"
        hba.write_text("local all guarded scram-sha-256\nlocal all all trust\n")
        query(dsn, "SELECT pg_reload_conf()")
        wrong = psycopg2.extensions.make_dsn(dsn, user="guarded", password="wrong")
        wait_for(
            "the new rules",
            lambda: (
                query(dsn, "SELECT count(*) FROM pg_hba_file_rules WHERE auth_method = 'scram-sha-256'")
                == [(1,)]
            ),
        )
        exportd = Exportd(folder, wrong)
        for command in (["serve"], ["migrate", "up"]):
            line = failure_of(exportd.call(*command))
            assert 'password authentication failed for user "guarded"' in line
            assert "wrong" not in line.removeprefix("exportd: connection")


def test_a_database_that_never_comes_up_is_waited_for_in_vain(exportd: Exportd, tmp_path: Path) -> None:
    done = exportd.call(
        "serve",
        EXPORTD_DATABASE__DSN=f"host={tmp_path} dbname=x",
        EXPORTD_DATABASE__STARTUP_TIMEOUT_SECONDS="0.5",
    )
    assert done.returncode == 1
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()] == ["database_waiting"]
    (line,) = done.stderr.splitlines()
    assert "No such file or directory" in line


def nothing_is_left(exportd: Exportd) -> bool:
    files = [
        path for path in exportd.storage.rglob("*") if path.is_file() and path.name != ".exportd-storage"
    ]
    return not files and query(exportd.dsn, "SELECT count(*) FROM export_jobs") == [(0,)]


def test_publish_refuses_bad_input_in_one_line_and_leaves_nothing(
    exportd: Exportd, source: Path, tmp_path: Path
) -> None:
    options = ("--user", "ann", "--tool", "Form")
    assert "nowhere: No such file or directory" in failure_of(exportd.call("publish", "nowhere", *options))
    (tmp_path / "text.tar.gz").write_text("hello")
    assert "is no sound .tar.gz" in failure_of(exportd.call("publish", "text.tar.gz", *options))
    os.mkfifo(source / "fifo")
    assert "fifo is neither a file" in failure_of(exportd.call("publish", source, *options))
    assert nothing_is_left(exportd)
    usage = exportd.call("publish", source, "--user", " ", "--tool", "Form")
    assert usage.returncode == 2
    assert "--user must not be empty" in usage.stderr


def test_publish_to_a_database_that_went_away_leaves_nothing(
    exportd: Exportd, source: Path, server_dsn: str
) -> None:
    name = psycopg2.extensions.parse_dsn(exportd.dsn)["dbname"]
    query(server_dsn, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    done = exportd.call("publish", source, "--user", "ann", "--tool", "Form")
    query(server_dsn, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    assert "not currently accepting connections" in failure_of(done)
    assert nothing_is_left(exportd)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_publish_interrupted_while_packing_leaves_nothing(
    exportd: Exportd, large_source: Path, source: Path, number: signal.Signals
) -> None:
    for copy in range(10):
        os.link(large_source / "data.bin", large_source / f"copy-{copy}")
        (large_source / f"more-{copy}").write_bytes(random.Random(copy).randbytes(8_000_000))
    process = subprocess.Popen(
        [sys.executable, "-m", "exportd", "publish", large_source, "--user", "ann", "--tool", "Form"],
        env=exportd.environ,
        cwd=exportd.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    incoming = exportd.storage / ".incoming"
    wait_for("bytes of the package", lambda: any(path.stat().st_size for path in incoming.glob("*.part")))
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert stdout == ""
    assert "Traceback" not in stderr
    assert not list(exportd.storage.glob("*.tar.gz"))
    if number == signal.SIGKILL:
        # A killed process cannot tidy up; the daemon does when it starts.
        daemon = exportd.serve()
        assert daemon.wait_for_event("abandoned_files_removed")["count"] == 1
    assert nothing_is_left(exportd)


def test_publish_shows_progress_on_a_terminal_only(exportd: Exportd, source: Path) -> None:
    controller, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "exportd", "publish", source, "--user", "ann", "--tool", "Form"],
        env=exportd.environ,
        cwd=exportd.folder,
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
    )
    os.close(terminal)
    shown = ""
    try:
        while data := os.read(controller, 65536):
            shown += data.decode()
    except OSError:  # the other side of a terminal is closed: EIO
        pass
    os.close(controller)
    stdout, _ = process.communicate(timeout=60)
    assert "Packing" in shown
    assert "100%" in shown
    assert set(json.loads(stdout)) >= {"jobId"}


def test_token_carries_the_role_and_the_time(exportd: Exportd, source: Path) -> None:
    published = exportd.publish(source)
    daemon = exportd.serve()
    admin = exportd.call("token", "--user", "root", "--role", "admin").stdout.strip()
    stranger = exportd.call("token", "--user", "eve").stdout.strip()
    assert get(daemon, path_of(published), {"Authorization": f"Bearer {admin}"})[0] == 200
    assert get(daemon, path_of(published), {"Authorization": f"Bearer {stranger}"})[0] == 403
    assert get(daemon, path_of(published), bearer("ann", ttl_seconds=-1))[0] == 401


def test_without_a_secret_one_is_made_in_the_data_folder(exportd: Exportd, source: Path) -> None:
    exportd.environ["EXPORTD_AUTH__SECRET"] = ""
    published = exportd.publish(source)
    token = exportd.call("token", "--user", "ann").stdout.strip()
    daemon = exportd.serve()
    assert get(daemon, path_of(published), {"Authorization": f"Bearer {token}"})[0] == 200
    assert (exportd.folder / "data" / "secret").stat().st_mode & 0o777 == 0o600


def test_demo_serves_the_sample_that_its_curl_line_downloads(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    require("curl")
    exportd = Exportd(tmp_path_factory.mktemp("d"), dsn="")
    output = tmp_path / "demo.log"
    with output.open("w") as stdout:
        process = subprocess.Popen(
            [sys.executable, "-m", "exportd", "demo"], env=exportd.environ, cwd=exportd.folder, stdout=stdout
        )
    try:
        wait_for("the demo", lambda: "Ctrl-C" in output.read_text())
        curl, stats = [line.strip() for line in output.read_text().splitlines() if line.startswith("  curl")]
        subprocess.run(f"{curl} -sSf", shell=True, cwd=tmp_path, check=True)
        (file,) = tmp_path.glob("export-sample-export-*.tar.gz")
        assert f"sha256 {sha256(file.read_bytes())}" in output.read_text()
        wait_for(
            "the count",
            lambda: json.loads(subprocess.check_output(f"{stats} -sSf", shell=True))["downloadCount"] == 1,
        )
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_help_names_every_command(exportd: Exportd) -> None:
    text = exportd.run("--help").stdout
    assert {"serve", "packer", "publish", "token", "migrate", "demo"} < set(cli.commands)
    for name, command in cli.commands.items():
        assert f"\n  {name} " in text
        assert CliRunner().invoke(command, ["--help"]).exit_code == 0
    assert exportd.call("--version").stdout.startswith("exportd, version ")
    assert exportd.call("nonsense").returncode == 2


def test_stats_tell_of_one_job_and_of_all(exportd: Exportd, source: Path) -> None:
    published = exportd.publish(source)
    daemon = exportd.serve()
    assert get(daemon, path_of(published))[0] == 200
    answer = statistics(daemon, published)
    assert daemon.stop() == 0

    done = exportd.call("stats", published["jobId"], "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == answer
    assert (answer["downloadCount"], answer["uniqueUsers"], answer["failures"]) == (1, 1, [])
    events: Any = answer["recentEvents"]
    (delivery,) = events
    assert delivery["bytesAcknowledged"] == published["packageSizeBytes"]

    of_all = json.loads(exportd.call("stats", "--json").stdout)
    assert (of_all["jobId"], of_all["downloadCount"]) == (None, 1)
    table = exportd.call("stats").stdout
    assert "downloads      1\n" in table
    assert "1MB_to_10MB" in table
    assert "completed" in table

    missing = exportd.call("stats", str(uuid.uuid4()))
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "there is no job" in missing.stderr
    assert exportd.call("stats", "nonsense").returncode == 2
