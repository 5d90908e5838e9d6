"""Making a package: a folder, or a ready ``.tar.gz``, becomes a file in the storage.

The bytes go to a temporary name in the storage's own file system, are synced, and only then get their
final name. A process that is killed leaves the temporary file; the next one that packs, and the daemon when
it starts, remove every temporary file that no living process holds a lock on.
"""

import contextlib
import fcntl
import hashlib
import os
import secrets
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol
from uuid import UUID

from isal import igzip_threaded, isal_zlib

from exportd.errors import OperatorError

_INCOMING = ".incoming"
_COPY_BYTES = 1024 * 1024
_COMPRESSION_THREADS = 2

Progress = Callable[[int], None]


class PackError(OperatorError):
    """The package could not be made, and nothing of it is left. The message is for the operator.

    ``public`` is for the export's user, and tells nothing of the server. ``is_final``: trying again is of no
    use.
    """

    public = "The server could not make the package"

    def __init__(self, message: str, *, is_final: bool = False, public: str | None = None) -> None:
        super().__init__(message)
        self.is_final = is_final
        self.public = public or PackError.public


class _Writable(Protocol):
    def write(self, data: bytes, /) -> object: ...


class DraftPackage:
    """A package that is complete and synced, and not yet in its place. Made by ``draft_package``."""

    def __init__(self, temporary: Path, final: Path, size_bytes: int, sha256: str) -> None:
        self._temporary = temporary
        self._final = final
        self.size_bytes = size_bytes
        self.sha256 = sha256
        self._is_placed = self._is_kept = False

    @property
    def path(self) -> str:
        """The package's name, relative to the storage root."""
        return self._final.name

    def place(self) -> None:
        """Gives the package its final name, durably. Raises PackError."""
        try:
            self._temporary.rename(self._final)
            self._is_placed = True
            _sync_folder(self._final.parent)
        except OSError as error:
            raise PackError(_describe(error)) from error

    def keep(self) -> None:
        """The package stays when the draft's block ends: its job is recorded, or may be."""
        self._is_kept = True

    def discard(self) -> None:
        """Removes what was placed and not kept. What others placed under the same name stays."""
        if self._is_placed and not self._is_kept:
            self._final.unlink(missing_ok=True)


@contextlib.contextmanager
def draft_package(source: Path, root: Path, job_id: UUID, progress: Progress) -> Iterator[DraftPackage]:
    """Packs ``source`` for the storage at ``root``; unless the block keeps the draft, nothing of it is left.

    A folder is packed as ``.tar.gz``; a file must be a sound one already, and is copied. Memory is constant
    whatever the size. ``progress`` is told the bytes read since its last call, and may raise to give up.
    Raises PackError.
    """
    # Two may pack the same job, if the first was given up for dead.
    temporary = root / _INCOMING / f"{job_id}-{secrets.token_hex(4)}.part"
    try:
        with _locked_file(source, root, temporary) as file:
            size_and_digest = _fill(source.resolve(), file, progress)
            draft = DraftPackage(temporary, root / f"{job_id}.tar.gz", *size_and_digest)
            try:
                yield draft
            finally:
                draft.discard()
    finally:
        temporary.unlink(missing_ok=True)


def measure_source(source: Path) -> int:
    """How many bytes packing ``source`` will read. Raises PackError for what cannot be packed."""
    try:
        if source.is_dir():
            found = (_examine(path) for path in _walk(source))
            return sum(status.st_size for status in found if stat.S_ISREG(status.st_mode))
        return _examine(source.resolve(strict=True)).st_size
    except FileNotFoundError as error:
        raise PackError(_describe(error), is_final=True, public="Its source is not there") from error
    except OSError as error:
        raise PackError(_describe(error)) from error


def remove_abandoned(root: Path) -> int:
    """Removes the temporary files of processes that were killed, and returns how many. Raises OSError."""
    removed = 0
    for path in (root / _INCOMING).glob("*.part"):
        # Its maker may finish just now, and take the name away.
        with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            removed += 1
    return removed


@contextlib.contextmanager
def _locked_file(source: Path, root: Path, temporary: Path) -> Iterator[IO[bytes]]:
    if source.is_dir() and root.resolve().is_relative_to(source.resolve()):
        raise PackError(
            f"{source} contains the package storage {root}, so it would be packed into itself", is_final=True
        )
    try:
        temporary.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_abandoned(root)
        file = _create_locked(temporary)
    except OSError as error:
        raise PackError(_describe(error)) from error
    with file:
        yield file


def _create_locked(path: Path) -> IO[bytes]:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return file
        # Before it was locked, somebody took it for abandoned.
        file.close()


def _fill(source: Path, file: IO[bytes], progress: Progress) -> tuple[int, str]:
    """Writes the package and returns its size and SHA-256."""
    writer = _HashingWriter(file)
    try:
        if source.is_dir():
            _pack_folder(source, writer, progress)
        else:
            _copy_package(source, writer, progress)
            _check_package(source, file, progress)
        file.flush()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size, writer.sha256.hexdigest()
    except OSError as error:
        raise PackError(f"packing {source}: {_describe(error)}") from error


class _HashingWriter:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        while view:
            # An unbuffered write may take less than it was given.
            written = self._file.write(view)
            view = view[written:]
        self.sha256.update(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def _pack_folder(folder: Path, writer: _Writable, progress: Progress) -> None:
    with (
        igzip_threaded.open(writer, "wb", threads=_COMPRESSION_THREADS) as compressed,  # type: ignore[no-untyped-call]
        tarfile.open(fileobj=compressed, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        _add(archive, folder, folder.name or "root", progress)
        for path in _walk(folder):
            _add(archive, path, f"{folder.name or 'root'}/{path.relative_to(folder)}", progress)


def _add(archive: tarfile.TarFile, path: Path, name: str, progress: Progress) -> None:
    status = _examine(path)
    member = archive.gettarinfo(path, name)
    if member.isreg():
        with path.open("rb") as content:
            archive.addfile(member, _Metered(content, progress))
    else:
        archive.addfile(member)
    # tarfile remembers every member and inode; only the links among them matter, and memory is to stay flat.
    archive.members.clear()  # type: ignore[attr-defined]
    if status.st_nlink == 1:
        archive.inodes.pop((status.st_ino, status.st_dev), None)  # type: ignore[attr-defined]


class _Metered:
    """A file whose reads are reported."""

    def __init__(self, file: IO[bytes], progress: Progress) -> None:
        self._file = file
        self._progress = progress

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._progress(len(data))
        return data


def _copy_package(source: Path, writer: _Writable, progress: Progress) -> None:
    with source.open("rb") as file:
        metered = _Metered(file, progress)
        while data := metered.read(_COPY_BYTES):
            writer.write(data)


def _check_package(source: Path, file: IO[bytes], progress: Progress) -> None:
    """Reads the copy to its end as gzip and as tar. Raises PackError."""
    file.seek(0)
    try:
        with (
            igzip_threaded.open(file, "rb") as content,  # type: ignore[no-untyped-call]
            tarfile.open(fileobj=content, mode="r|") as archive,
        ):
            while archive.next() is not None:
                archive.members.clear()  # type: ignore[attr-defined]
                progress(0)
            while content.read(_COPY_BYTES):
                progress(0)
    except (tarfile.TarError, EOFError, zlib.error, isal_zlib.error) as error:  # type: ignore[misc]
        raise _unsound(source, error) from error
    except OSError as error:
        # gzip.BadGzipFile is an OSError without an errno.
        if error.errno is None:
            raise _unsound(source, error) from error
        raise


def _unsound(source: Path, error: Exception) -> PackError:
    message = f"{source} is no sound .tar.gz: {error}"
    return PackError(message, is_final=True, public="Its source is no sound .tar.gz")


def _walk(folder: Path) -> Iterator[Path]:
    """Everything below a folder, sorted, without following symbolic links. Raises OSError."""
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        yield Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))


def _examine(path: Path) -> os.stat_result:
    status = path.lstat()
    mode = status.st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
        raise PackError(
            f"{path} is neither a file, a folder nor a symbolic link, and cannot be packed",
            is_final=True,
            public="Its source holds something that cannot be packed, such as a device",
        )
    return status


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _describe(error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason
