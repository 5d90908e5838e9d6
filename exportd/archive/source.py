"""The source of a package: a folder or a ready ``.tar.gz``, accessed by descriptors only.

A path is resolved once. Below its root, each name is opened in the folder that is already open, and never
through a symbolic link. No name is resolved twice, so a user who renames files in a source cannot lead the
packer out of it.
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
# O_NONBLOCK: a file that was replaced by a FIFO must not hang the packer. Regular files ignore it.
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
# The number of open folders, however deep the tree is. A process may often open only 1024 files.
_MAX_OPEN_FOLDERS = 100


class PackError(OperatorError):
    """The package could not be made, and its draft is removed. The message is for the operator.

    ``public`` is for the export's user and reveals nothing about the server. ``is_final``: a retry is
    useless.
    """

    public = "The server could not make the package"

    def __init__(self, message: str, *, is_final: bool = False, public: str | None = None) -> None:
        super().__init__(message)
        self.is_final = is_final
        self.public = public or PackError.public


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a source, below its top. ``path`` is relative, with slashes.

    ``folder`` is the descriptor of the folder that holds ``name``, open until the next entry.
    """

    path: str
    name: str
    folder: int
    status: os.stat_result

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """Opens a regular file, which must not change while the block runs. Raises PackError."""
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
        """Returns the bytes that packing will read. Raises PackError for entries that cannot be packed, and
        OSError."""
        if not self.is_folder:
            return self.status.st_size
        return sum(entry.status.st_size for entry in self.walk() if stat.S_ISREG(entry.status.st_mode))

    def walk(self) -> Iterator[Entry]:
        """Yields every entry below a folder: the files of a folder in the file system's order, then its
        folders. Memory does not grow with the number of files, nor do open descriptors with the depth.

        Raises PackError for entries that cannot be packed and for a folder that changes meanwhile, and
        OSError.
        """
        with contextlib.closing(_OpenFolders(self.descriptor)) as folders:
            # The names of the folders to visit, by level.
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
    """Opens a source, which must lie in one of ``roots``. Follows links on the way there.

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
    """Raises PackError if the open file or folder changed while the block ran."""
    before = os.fstat(descriptor)
    yield
    after = os.fstat(descriptor)
    if _version(before) != _version(after):
        raise changed(path)


def changed(path: str) -> PackError:
    """The error for a file that changes while it is packed. A retry may find it unchanged."""
    return PackError(f"{path} changed while it was packed", public="Its source changed while it was packed")


def check_kind(status: os.stat_result, path: str, *, is_link_allowed: bool) -> None:
    """Raises PackError unless it is a file, a folder or, if allowed, a symbolic link."""
    mode = status.st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or (is_link_allowed and stat.S_ISLNK(mode))):
        raise PackError(
            f"{path} is neither a file, a folder nor a symbolic link, and cannot be packed",
            is_final=True,
            public="Its source holds something that cannot be packed, such as a device",
        )


def describe(error: OSError) -> str:
    """Describes an error of the operating system in a message."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def _missing(path: Path, error: Exception) -> str:
    return describe(error) if isinstance(error, OSError) else f"{path}: {error}"


def _open_below(root: Path, names: Sequence[str]) -> int:
    """Opens a path of ``names`` below the folder ``root``, through no symbolic link. Raises OSError."""
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
    """Yields the entries that are not folders, and returns the names of the folders in reverse."""
    names: list[str] = []
    with unchanged(folder, prefix or "."), os.scandir(folder) as scan:
        for found in scan:
            # By the folder's descriptor, because found.path is only a name.
            status = os.stat(found.name, dir_fd=folder, follow_symlinks=False)
            path = f"{prefix}{found.name}"
            check_kind(status, path, is_link_allowed=True)
            if stat.S_ISDIR(status.st_mode):
                names.append(found.name)
            else:
                yield Entry(path, found.name, folder, status)
    return sorted(names, reverse=True)


class _OpenFolders:
    """The folders from the top of a source to the current one. Only the last few are open."""

    def __init__(self, top: int) -> None:
        self._top = os.dup(top)
        # The descriptor of each, or None if it is closed, and its identity.
        self._stack: list[tuple[int | None, tuple[int, int]]] = [(self._top, _identity(self._top))]

    @property
    def current(self) -> int:
        descriptor = self._stack[-1][0]
        assert descriptor is not None
        return descriptor

    def enter(self, name: str, path: str) -> None:
        """Raises PackError if the name is no longer a folder."""
        try:
            descriptor = os.open(name, _OPEN_FOLDER, dir_fd=self.current)
        except NotADirectoryError as error:
            raise changed(path) from error
        except OSError as error:
            # ELOOP: a symbolic link has replaced the folder.
            raise (changed(path) if error.errno == errno.ELOOP else error) from error
        self._stack.append((descriptor, _identity(descriptor)))
        if len(self._stack) > _MAX_OPEN_FOLDERS:
            far, identity = self._stack[-_MAX_OPEN_FOLDERS - 1]
            if far is not None:
                os.close(far)
                self._stack[-_MAX_OPEN_FOLDERS - 1] = (None, identity)

    def leave(self) -> None:
        """Returns to the folder above. Raises PackError if the folder was moved meanwhile."""
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
