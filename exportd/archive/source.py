"""The source of a package: a folder or a ready ``.tar.gz``, reached by descriptors only.

A path is looked up once. Below the folder that it must lie in, each name is opened in the folder that is open
already, and never through a symbolic link. No name is looked up twice, so a user who renames files in a
source cannot lead the packer out of it.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from exportd.errors import OperatorError

_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a file that was replaced by a FIFO must not hang the packer. Regular files do not heed it.
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
# Folders that are open at once, however deep the tree is; a process may often open no more than 1024 files.
_MAX_OPEN_FOLDERS = 100


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


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a source, below its top. ``path`` is relative, with slashes.

    ``folder`` is the open descriptor of the folder that holds ``name``, until the next entry is asked for.
    """

    path: str
    name: str
    folder: int
    status: os.stat_result

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """The descriptor of a regular file, which must not change while the block lasts. Raises PackError."""
        descriptor = os.open(self.name, _OPEN_FILE, dir_fd=self.folder)
        try:
            with unchanged(descriptor, self.path):
                yield descriptor
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Source:
    """An open source. ``path`` is for messages only."""

    path: Path
    descriptor: int
    status: os.stat_result

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.status.st_mode)

    def measure(self) -> int:
        """How many bytes packing will read. Raises PackError for what cannot be packed, and OSError."""
        if not self.is_folder:
            return self.status.st_size
        return sum(entry.status.st_size for entry in self.walk() if stat.S_ISREG(entry.status.st_mode))

    def walk(self) -> Iterator[Entry]:
        """Everything below a folder: of each folder first its files, as the file system lists them, then the
        folders in it. Memory does not grow with the number of files, nor open descriptors with the depth.

        Raises PackError for what cannot be packed and for a folder that changes meanwhile, and OSError.
        """
        with contextlib.closing(_OpenFolders(self.descriptor)) as folders:
            # The names of folders to come, by level.
            below_top = yield from _list_files(folders.current, "")
            waiting = [below_top]
            names: list[str] = []
            while waiting:
                if not waiting[-1]:
                    waiting.pop()
                    if waiting:
                        names.pop()
                        folders.leave()
                    continue
                name = waiting[-1].pop()
                path = "/".join((*names, name))
                status = os.stat(name, dir_fd=folders.current, follow_symlinks=False)
                yield Entry(path, name, folders.current, status)
                folders.enter(name, path)
                names.append(name)
                below = yield from _list_files(folders.current, f"{path}/")
                waiting.append(below)


@contextlib.contextmanager
def open_source(path: Path, roots: Sequence[Path] = (Path("/"),)) -> Iterator[Source]:
    """Opens a source, which must lie in one of ``roots``; links that lead there are followed.

    Raises PackError.
    """
    try:
        resolved = path.resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise PackError(_missing(path, error), is_final=True, public="Its source is not there") from error
    root = next((root for root in roots if resolved.is_relative_to(root)), None)
    if root is None:
        raise PackError(
            f"{resolved} is in none of [packer] source_roots",
            is_final=True,
            public="Its source is not where exports may be taken from",
        )
    try:
        descriptor = _open_below(root, resolved.relative_to(root).parts)
    except FileNotFoundError as error:
        raise PackError(_missing(path, error), is_final=True, public="Its source is not there") from error
    except OSError as error:
        raise PackError(describe(error)) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISDIR(status.st_mode):
            check_kind(status, str(path), is_link_allowed=False)
        yield Source(resolved, descriptor, status)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def unchanged(descriptor: int, path: str) -> Iterator[None]:
    """Raises PackError where the open file or folder was changed while the block lasted."""
    before = os.fstat(descriptor)
    yield
    after = os.fstat(descriptor)
    if _version(before) != _version(after):
        raise changed(path)


def changed(path: str) -> PackError:
    """What was packed of it would be torn; another attempt may find it at rest."""
    return PackError(f"{path} changed while it was packed", public="Its source changed while it was packed")


def check_kind(status: os.stat_result, path: str, *, is_link_allowed: bool) -> None:
    """Raises PackError for what is neither a file, a folder nor, where allowed, a symbolic link."""
    mode = status.st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or (is_link_allowed and stat.S_ISLNK(mode))):
        raise PackError(
            f"{path} is neither a file, a folder nor a symbolic link, and cannot be packed",
            is_final=True,
            public="Its source holds something that cannot be packed, such as a device",
        )


def describe(error: OSError) -> str:
    """An error of the operating system, for a message."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def _missing(path: Path, error: Exception) -> str:
    return describe(error) if isinstance(error, OSError) else f"{path}: {error}"


def _open_below(root: Path, names: Sequence[str]) -> int:
    """Opens what ``names`` lead to, from the folder ``root`` on, through no symbolic link. Raises OSError."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for position, name in enumerate(names, 1):
        try:
            flags = _OPEN_FILE if position == len(names) else _OPEN_FOLDER
            inner = os.open(name, flags, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = inner
    return descriptor


def _list_files(folder: int, prefix: str) -> Generator[Entry, None, list[str]]:
    """Yields what is not a folder, and returns the names of the folders, the last one first."""
    names: list[str] = []
    with unchanged(folder, prefix or "."), os.scandir(folder) as scan:
        for found in scan:
            # By the folder's own descriptor: found.path is only a name.
            status = os.stat(found.name, dir_fd=folder, follow_symlinks=False)
            path = f"{prefix}{found.name}"
            check_kind(status, path, is_link_allowed=True)
            if stat.S_ISDIR(status.st_mode):
                names.append(found.name)
            else:
                yield Entry(path, found.name, folder, status)
    return sorted(names, reverse=True)


class _OpenFolders:
    """The folders from the top of a source down to the current one, of which the last few are open."""

    def __init__(self, top: int) -> None:
        self._top = os.dup(top)
        # Descriptor, or None where it is closed, and identity of each.
        self._stack: list[tuple[int | None, tuple[int, int]]] = [(self._top, _identity(self._top))]

    @property
    def current(self) -> int:
        descriptor = self._stack[-1][0]
        assert descriptor is not None
        return descriptor

    def enter(self, name: str, path: str) -> None:
        """Raises PackError where the name is no folder any more."""
        try:
            descriptor = os.open(name, _OPEN_FOLDER, dir_fd=self.current)
        except NotADirectoryError as error:
            raise changed(path) from error
        except OSError as error:
            # ELOOP: a symbolic link took the folder's place.
            raise (changed(path) if error.errno == errno.ELOOP else error) from error
        self._stack.append((descriptor, _identity(descriptor)))
        if len(self._stack) > _MAX_OPEN_FOLDERS:
            far, identity = self._stack[-_MAX_OPEN_FOLDERS - 1]
            if far is not None:
                os.close(far)
                self._stack[-_MAX_OPEN_FOLDERS - 1] = (None, identity)

    def leave(self) -> None:
        """Goes back to the folder above. Raises PackError where it was moved meanwhile."""
        inner, _ = self._stack.pop()
        assert inner is not None
        above, identity = self._stack[-1]
        try:
            if above is None:
                above = os.open("..", _OPEN_FOLDER, dir_fd=inner)
                self._stack[-1] = (above, identity)
                if _identity(above) != identity:
                    raise changed("..")
        finally:
            os.close(inner)

    def close(self) -> None:
        for descriptor, _ in self._stack:
            if descriptor is not None:
                os.close(descriptor)


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _version(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
