"""The package storage: opens packages below the root, and nothing outside it.

A package is opened once, from a descriptor of the root, one path component at a time and never through a
symbolic link, so there is no gap between check and use. Its size and identity come from the open descriptor.
From then on its name no longer matters.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO without a writer must not hang. Regular files ignore it.
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY

_SAMPLE_BYTES = 4096

# An unmounted storage looks like one that lost every package. This file tells them apart.
_MARKER = ".exportd-storage"


class PackageMissing(Exception):
    """The file does not exist."""


class PackageUnusable(Exception):
    """The package cannot be served. The message is for the log."""


class PackageChanged(Exception):
    """The package was written to since it was opened, so the sent bytes may be of two versions."""


@dataclass(frozen=True, slots=True)
class OpenPackage:
    """A package that is open for reading. The caller closes it, best with a ``with`` block."""

    descriptor: int
    size_bytes: int
    modified_ns: int

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def sample(self) -> bytes:
        """Returns the file's first and last 4 KiB, which hold a gzip's time and checksum. Raises OSError."""
        return os.pread(self.descriptor, _SAMPLE_BYTES, 0) + os.pread(
            self.descriptor, _SAMPLE_BYTES, max(0, self.size_bytes - _SAMPLE_BYTES)
        )

    def check_unchanged(self) -> None:
        """Raises PackageChanged if the file was written to since it was opened, and OSError if the system
        cannot tell.

        Compares the time of the last write, not of the last change: the cleanup may unlink the file
        meanwhile, which does not matter to the download.
        """
        status = os.fstat(self.descriptor)
        if status.st_size != self.size_bytes:
            raise PackageChanged(f"the file has {status.st_size} bytes, and had {self.size_bytes}")
        if status.st_mtime_ns != self.modified_ns:
            raise PackageChanged("the file was written to")


class PackageStore:
    """Packages under one local folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # The root may be a symbolic link, and rows may hold its real path.
        self._root_names = [_split(str(root)), _split(os.path.realpath(root))]

    def open(self, package_path: str, expected_size_bytes: int | None) -> OpenPackage:
        """Opens a package by its name: a path relative to the root, or an absolute one inside it.

        ``expected_size_bytes`` is the recorded size; None: unknown. Raises PackageMissing if the file does
        not exist, and PackageUnusable for every other failure: another size, no permission, no regular file,
        a path that leaves the root, a missing root, no descriptor left, an I/O error.
        """
        with self._folder_of(package_path) as (folder, name):
            descriptor = os.open(name, _OPEN_FILE, dir_fd=folder)
        try:
            return _examine(descriptor, expected_size_bytes)
        except BaseException:
            os.close(descriptor)
            raise

    def remove(self, package_path: str) -> int:
        """Unlinks a package and returns its size in bytes. Running downloads of it continue.

        Raises PackageMissing if the file does not exist, and PackageUnusable for every other failure.
        """
        with self._folder_of(package_path) as (folder, name):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                raise PackageUnusable("not a regular file")
            os.unlink(name, dir_fd=folder)
        return status.st_size

    def mark(self) -> None:
        """Writes the marker into the root. Raises OSError."""
        (self.root / _MARKER).touch()

    def is_marked(self) -> bool:
        """Whether the root has the marker."""
        return (self.root / _MARKER).is_file()

    def list_files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Yields every file below the root, with its relative name, except names that begin with a dot and
        the contents of such folders. Follows no symbolic link. Raises OSError."""
        folders = [""]
        while folders:
            below = folders.pop()
            with os.scandir(self.root / below) as scan:
                for entry in scan:
                    name = f"{below}{entry.name}"
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{name}/")
                        continue
                    # The file may have been deleted meanwhile.
                    with contextlib.suppress(FileNotFoundError):
                        yield name, entry.stat(follow_symlinks=False)

    def name_of(self, package_path: str) -> str | None:
        """Returns the name that ``list_files`` yields for a package. None: it cannot be in the storage."""
        try:
            return "/".join(self._names_below_root(package_path))
        except PackageUnusable:
            return None

    def spellings(self, name: str) -> list[str]:
        """The usual paths of a package with that name: relative, and below the root."""
        return [name, *(f"{root}/{name}" for root in {str(self.root), os.path.realpath(self.root)})]

    def is_ready(self) -> bool:
        """Whether the root can be entered and read."""
        return os.access(self.root, os.R_OK | os.X_OK) and self.root.is_dir()

    @contextlib.contextmanager
    def _folder_of(self, package_path: str) -> Iterator[tuple[int, str]]:
        """Opens the folder of a package and yields it with the package's name there. Translates OSError of
        the block."""
        names = self._names_below_root(package_path)
        try:
            folder = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise PackageUnusable(f"storage root: {error.strerror}") from error
        try:
            for name in names[:-1]:
                inner = os.open(name, _OPEN_FOLDER, dir_fd=folder)
                os.close(folder)
                folder = inner
            yield folder, names[-1]
        except FileNotFoundError as error:
            raise PackageMissing(package_path) from error
        except OSError as error:
            raise PackageUnusable(error.strerror or str(error)) from error
        finally:
            os.close(folder)

    def _names_below_root(self, package_path: str) -> list[str]:
        names = _split(package_path)
        if package_path.startswith("/"):
            roots = [root for root in self._root_names if names[: len(root)] == root]
            if not roots:
                raise PackageUnusable("the path leads out of the storage root")
            names = names[len(roots[0]) :]
        if not names or ".." in names or "\0" in package_path:
            raise PackageUnusable("the path leads out of the storage root")
        return names


def _split(path: str) -> list[str]:
    return [name for name in path.split("/") if name not in ("", ".")]


def _examine(descriptor: int, expected_size_bytes: int | None) -> OpenPackage:
    try:
        status = os.fstat(descriptor)
    except OSError as error:
        raise PackageUnusable(error.strerror or str(error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise PackageUnusable("not a regular file")
    if expected_size_bytes is not None and status.st_size != expected_size_bytes:
        raise PackageUnusable(f"{status.st_size} bytes on disk, {expected_size_bytes} recorded")
    return OpenPackage(descriptor, status.st_size, status.st_mtime_ns)
