"""The real command in processes of its own: publish, serve, and what they print."""

import contextlib
import functools
import json
import logging
import os
import random
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import structlog
import trustme

from exportd.cli.main import main
from exportd.telemetry.logging import stop_logging
from tests.support.application import SECRET
from tests.support.postgres import migrated_database

WAIT_SECONDS = 60.0


def wait_for(what: str, condition: Callable[[], Any]) -> Any:
    """The first true value of ``condition``, or a failure that says what was waited for."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)
    pytest.fail(f"waited {WAIT_SECONDS} s for {what}")


class Daemon:
    """A running ``exportd serve``."""

    def __init__(self, process: subprocess.Popen[str], output: Path) -> None:
        self.process = process
        self.output = output
        self._skipped_lines = 0

    @property
    def log(self) -> list[dict[str, Any]]:
        """Every complete log line since ``skip_log``; each is one JSON object."""
        lines = self.output.read_text().splitlines(keepends=True)[self._skipped_lines :]
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def skip_log(self) -> None:
        """Leaves out what was logged so far: in another test."""
        assert self.url
        self._skipped_lines += len(self.log)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.log if line["event"] == name]

    def wait_for_event(self, name: str) -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            assert self.process.poll() in (None, 0, 1), self.output.read_text()
            return next(iter(self.events(name)), None)

        event: dict[str, Any] = wait_for(f"the log line {name}", found)
        return event

    @functools.cached_property
    def url(self) -> str:
        url: str = self.wait_for_event("server_started")["url"]
        return url

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(WAIT_SECONDS)

    def close(self) -> None:
        """Kills it, and shows what it said where the test fails."""
        self.process.kill()
        self.process.wait()
        sys.stdout.write(self.output.read_text(errors="replace")[-5000:])


class Exportd:
    """The command line, with a data folder and a database of its own."""

    def __init__(self, folder: Path, dsn: str) -> None:
        self.folder = folder
        self.dsn = dsn
        self._daemons: list[Daemon] = []
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("EXPORTD_")},
            "EXPORTD_DATA_DIR": str(folder / "data"),
            "EXPORTD_DATABASE__DSN": dsn,
            "EXPORTD_AUTH__SECRET": SECRET,
            "EXPORTD_SERVER__PORT": "0",
        }

    def leave_uncovered(self) -> None:
        """Without the measurement of coverage, which doubles what a process needs to start."""
        self.environ.pop("COVERAGE_PROCESS_CONFIG", None)

    @property
    def storage(self) -> Path:
        return self.folder / "data" / "packages"

    def call(self, *arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end in this process, where the process does not matter: it costs no start."""
        command = ["exportd", *map(str, arguments)]
        with contextlib.ExitStack() as stack:
            # Not the process's own environment: another thread, in libpq, may be reading it.
            stack.enter_context(mock.patch.object(os, "environ", {**self.environ, **environ}))
            stack.enter_context(contextlib.chdir(self.folder))
            stack.enter_context(mock.patch.object(sys, "argv", command))
            stack.enter_context(_undisturbed_process())
            stdout = stack.enter_context(tempfile.TemporaryFile("w+"))
            stderr = stack.enter_context(tempfile.TemporaryFile("w+"))
            stack.enter_context(contextlib.redirect_stdout(stdout))
            stack.enter_context(contextlib.redirect_stderr(stderr))
            try:
                main()
            except SystemExit as error:
                status = error.code if isinstance(error.code, int) else int(error.code is not None)
            else:
                status = 0
            stop_logging()
            stdout.seek(0)
            stderr.seek(0)
            return subprocess.CompletedProcess(command, status, stdout.read(), stderr.read())

    def run(self, *arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end, in a process of its own."""
        return subprocess.run(
            [sys.executable, "-m", "exportd", *map(str, arguments)],
            env={**self.environ, **environ},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
        )

    def publish(self, source: Path, *options: object) -> dict[str, Any]:
        """Publishes for ann; what the command printed."""
        done = self.call("publish", source, "--user", "ann", "--tool", "Form", *options)
        assert done.returncode == 0, done.stderr
        published: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return published

    def serve(self, *options: object, under: Any = (), **environ: str) -> Daemon:
        """Starts a daemon, ``under`` another command if asked; it is killed at the end of the test."""
        output = self.folder / f"daemon-{len(self._daemons)}.log"
        with output.open("w") as stdout:
            process = subprocess.Popen(
                [*map(str, under), sys.executable, "-m", "exportd", "serve", *map(str, options)],
                env={**self.environ, **environ},
                cwd=self.folder,
                stdout=stdout,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        daemon = Daemon(process, output)
        self._daemons.append(daemon)
        return daemon

    def close(self) -> None:
        for daemon in self._daemons:
            if daemon.process.poll() is None:
                daemon.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    daemon.process.wait(5)
            # With whatever it was started under: faketime passes no signal on.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.process.pid, signal.SIGKILL)
            daemon.close()


@contextlib.contextmanager
def _undisturbed_process() -> Iterator[None]:
    """Takes back what a command changes in its process: signal handlers and logging."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    root, configuration = logging.getLogger(), structlog.get_config()
    root_handlers, level = root.handlers[:], root.level
    # logging.basicConfig(force=True) would close pytest's own.
    root.handlers.clear()
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.handlers[:], root.level = root_handlers, level
        structlog.configure(**configuration)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def exportd(tmp_path: Path, dsn: str) -> Iterator[Exportd]:
    command = Exportd(tmp_path, dsn)
    yield command
    command.close()


@pytest.fixture(scope="module")
def shared_exportd(server_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exportd]:
    """For tests that leave nothing behind: one for all of a module."""
    with migrated_database(server_dsn) as dsn:
        command = Exportd(tmp_path_factory.mktemp("shared"), dsn)
        command.leave_uncovered()
        yield command
        command.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "data.bin").write_bytes(random.Random(1).randbytes(2_000_000))
    (folder / "readme.txt").write_text("hello\n" * 1000)
    return folder


def serve_https(
    exportd: Exportd, folder: Path, *options: object, **environ: str
) -> tuple[Daemon, ssl.SSLContext]:
    """A daemon with a certificate of its own, and a context that trusts it."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    for pem in certificate.cert_chain_pems:
        pem.write_to_path(folder / "cert.pem", append=True)
    files = {"CERT": str(folder / "cert.pem"), "KEY": str(folder / "key.pem")}
    daemon = exportd.serve(
        *options, **{f"EXPORTD_SERVER__TLS_{name}": file for name, file in files.items()}, **environ
    )
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return daemon, context
