"""Makes packages of folders or of ready ``.tar.gz`` files.

The bytes go to a temporary file in the storage's file system, are synced, and only then get their final name.
A killed process leaves its temporary file. The next packing process, and the daemon at its start, remove
every temporary file that no running process has locked.
"""

import contextlib
import fcntl
import hashlib
import os
import secrets
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol
from uuid import UUID

from isal import igzip_threaded

from exportd.archive.check import check_archive
from exportd.archive.source import Entry, PackError, Source, changed, check_kind, describe, unchanged

_INCOMING = ".incoming"
_COPY_BYTES = 1024 * 1024
_COMPRESSION_THREADS = 2

Progress = Callable[[int], None]


class _Writable(Protocol):
    def write(self, data: bytes, /) -> object: ...


class DraftPackage:
    """A package that is complete and synced, but not in its place yet. Made by ``draft_package``."""

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
            raise PackError(describe(error)) from error

    def keep(self) -> None:
        """Keeps the package when the draft's block ends, because its job is recorded, or may be."""
        self._is_kept = True

    def discard(self) -> None:
        """Removes the package unless it was kept. Another process's package of the same name stays."""
        if self._is_placed and not self._is_kept:
            self._final.unlink(missing_ok=True)


@contextlib.contextmanager
def draft_package(source: Source, root: Path, job_id: UUID, progress: Progress) -> Iterator[DraftPackage]:
    """Packs ``source`` for the storage at ``root``. Removes the draft unless the block keeps it.

    A folder is packed as ``.tar.gz``. A file must be a sound ``.tar.gz`` already, and is copied. Memory use
    is constant. ``progress`` is called with the bytes read since its last call, and may raise to stop. Raises
    PackError.
    """
    # Two packers may pack the same job, if the first one lost its heartbeat.
    temporary = root / _INCOMING / f"{job_id}-{secrets.token_hex(4)}.part"
    try:
        with _locked_file(root, temporary) as file:
            size_and_digest = _fill(source, root, file, progress)
            draft = DraftPackage(temporary, root / f"{job_id}.tar.gz", *size_and_digest)
            try:
                yield draft
            finally:
                draft.discard()
    finally:
        temporary.unlink(missing_ok=True)


def remove_abandoned(root: Path) -> int:
    """Removes the temporary files of killed processes and returns their number. Raises OSError."""
    removed = 0
    for path in (root / _INCOMING).glob("*.part"):
        # Its process may finish at this moment and rename the file.
        with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            removed += 1
    return removed


@contextlib.contextmanager
def _locked_file(root: Path, temporary: Path) -> Iterator[IO[bytes]]:
    try:
        temporary.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_abandoned(root)
        file = _create_locked(temporary)
    except OSError as error:
        raise PackError(describe(error)) from error
    with file:
        yield file


def _create_locked(path: Path) -> IO[bytes]:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return file
        # Another process took the file for abandoned before it was locked.
        file.close()


def _fill(source: Source, root: Path, file: IO[bytes], progress: Progress) -> tuple[int, str]:
    """Writes the package and returns its size and SHA-256."""
    writer = _HashingWriter(file)
    try:
        if source.is_folder:
            _pack_folder(source, root, writer, progress)
        else:
            _copy_package(source, writer, progress)
            check_archive(file, source.path, progress)
        file.flush()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size, writer.sha256.hexdigest()
    except OSError as error:
        raise PackError(f"packing {source.path}: {describe(error)}") from error


class _HashingWriter:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        while view:
            # An unbuffered write may write less than it was given.
            written = self._file.write(view)
            view = view[written:]
        self.sha256.update(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def _pack_folder(source: Source, root: Path, writer: _Writable, progress: Progress) -> None:
    top = source.path.name or "root"
    with (
        igzip_threaded.open(writer, "wb", threads=_COMPRESSION_THREADS) as compressed,  # type: ignore[no-untyped-call]
        tarfile.open(fileobj=compressed, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        packing = _Packing(archive, root.stat(), progress)
        packing.check_storage(source.path.name, source.status)
        archive.addfile(packing.describe(top, source.status))
        for entry in source.walk():
            packing.add(f"{top}/{entry.path}", entry)


class _Packing:
    """An archive that grows entry by entry."""

    def __init__(self, archive: tarfile.TarFile, storage: os.stat_result, progress: Progress) -> None:
        self._archive = archive
        self._storage = storage
        self._progress = progress
        # The first name of each file that has several.
        self._links: dict[tuple[int, int], str] = {}

    def add(self, name: str, entry: Entry) -> None:
        """Raises PackError and OSError."""
        if stat.S_ISREG(entry.status.st_mode):
            with entry.opened() as descriptor:
                self._add_file(name, descriptor, entry.path)
        else:
            self.check_storage(entry.path, entry.status)
            member = self.describe(name, entry.status)
            if stat.S_ISLNK(entry.status.st_mode):
                member.type = tarfile.SYMTYPE
                member.linkname = os.readlink(entry.name, dir_fd=entry.folder)
            self._archive.addfile(member)
        # tarfile keeps every member in memory.
        self._archive.members.clear()  # type: ignore[attr-defined]

    def check_storage(self, path: str, status: os.stat_result) -> None:
        """Raises PackError for the package storage."""
        if os.path.samestat(status, self._storage):
            raise PackError(
                f"{path} is the package storage, which would be packed into itself", is_final=True
            )

    def _add_file(self, name: str, descriptor: int, path: str) -> None:
        # The status of the open file: its name may belong to another file now.
        status = os.fstat(descriptor)
        check_kind(status, path, is_link_allowed=False)
        member = self.describe(name, status)
        identity = (status.st_dev, status.st_ino)
        if status.st_nlink > 1 and identity in self._links:
            member.type, member.linkname = tarfile.LNKTYPE, self._links[identity]
            self._archive.addfile(member)
            return
        if status.st_nlink > 1:
            self._links[identity] = name
        member.size = status.st_size
        with open(descriptor, "rb", closefd=False) as content:
            try:
                self._archive.addfile(member, _Metered(content, self._progress))
            except OSError as error:
                # tarfile raises it without an errno if the file ends early.
                raise (error if error.errno else changed(path)) from error

    @staticmethod
    def describe(name: str, status: os.stat_result) -> tarfile.TarInfo:
        """The member's header, without owners, whose names and numbers are the server's."""
        member = tarfile.TarInfo(name)
        member.mode = status.st_mode & 0o777
        member.mtime = int(status.st_mtime)
        if stat.S_ISDIR(status.st_mode):
            member.type = tarfile.DIRTYPE
        return member


class _Metered:
    """A file whose reads are reported."""

    def __init__(self, file: IO[bytes], progress: Progress) -> None:
        self._file = file
        self._progress = progress

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._progress(len(data))
        return data


def _copy_package(source: Source, writer: _Writable, progress: Progress) -> None:
    with (
        unchanged(source.descriptor, str(source.path)),
        open(source.descriptor, "rb", closefd=False) as file,
    ):
        metered, left = _Metered(file, progress), source.status.st_size
        # Read only the size at the start: a file may grow for ever.
        while left and (data := metered.read(min(left, _COPY_BYTES))):
            writer.write(data)
            left -= len(data)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
