"""The package storage: names become open file descriptors, and nothing outside the root can be reached.

A package is opened once, from a descriptor of the root, one path component at a time and never through a
symbolic link, so there is no moment between check and use. What is true of the package (size, identity) is
read from the open descriptor. From then on its name no longer matters.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO that nobody writes to must not hang. It changes nothing for regular files.
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY

# A storage that is not mounted looks like one whose packages are all gone; this file tells them apart.
_MARKER = ".exportd-storage"


class PackageMissing(Exception):
    """There is no file of that name."""


class PackageUnusable(Exception):
    """The package is there, or should be, and cannot be served. The message says why, for the log."""


class PackageChanged(Exception):
    """The open package is not what it was when it was opened: what was sent of it may be of two versions."""


@dataclass(frozen=True, slots=True)
class OpenPackage:
    """A package that is open for reading. Whoever opened it closes it, best with a ``with`` block."""

    descriptor: int
    size_bytes: int
    device: int
    inode: int
    modified_ns: int

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def check_unchanged(self) -> None:
        """Raises PackageChanged if the file was written to since it was opened; OSError if nobody can say.

        The time of the last write tells, and not that of the last change: a cleanup may unlink the file
        meanwhile, which is none of the download's business.
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
        self._root_names = _split(str(root))

    def open(self, package_path: str, expected_size_bytes: int | None) -> OpenPackage:
        """Opens a package by its name: a path relative to the root, or an absolute one inside it.

        ``expected_size_bytes`` is what was recorded; None: nothing was. Raises PackageMissing where there is
        no such file, and PackageUnusable for everything else: another size, no permission, no regular file,
        a path that leaves the root, a root that is not there, no descriptor left, an I/O error.
        """
        with self._folder_of(package_path) as (folder, name):
            descriptor = os.open(name, _OPEN_FILE, dir_fd=folder)
        try:
            return _examine(descriptor, expected_size_bytes)
        except BaseException:
            os.close(descriptor)
            raise

    def remove(self, package_path: str) -> int:
        """Unlinks a package and returns its size in bytes. Whoever has it open reads on.

        Raises PackageMissing where there is no such file, and PackageUnusable for everything else.
        """
        with self._folder_of(package_path) as (folder, name):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                raise PackageUnusable("not a regular file")
            os.unlink(name, dir_fd=folder)
        return status.st_size

    def mark(self) -> None:
        """Puts the marker into the root, which is no empty mount point. Raises OSError."""
        (self.root / _MARKER).touch()

    def is_marked(self) -> bool:
        """Whether the marker is there."""
        return (self.root / _MARKER).is_file()

    def list_files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Every file below the root, by its name relative to it, but those whose names begin with a dot and
        what is in such folders. Follows no symbolic link. Raises OSError."""
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
                    # It may be gone by now.
                    with contextlib.suppress(FileNotFoundError):
                        yield name, entry.stat(follow_symlinks=False)

    def name_of(self, package_path: str) -> str | None:
        """The name by which ``list_files`` lists a package; None: it cannot be in the storage."""
        try:
            return "/".join(self._names_below_root(package_path))
        except PackageUnusable:
            return None

    def is_ready(self) -> bool:
        """Whether the root can be entered and read."""
        return os.access(self.root, os.R_OK | os.X_OK) and self.root.is_dir()

    @contextlib.contextmanager
    def _folder_of(self, package_path: str) -> Iterator[tuple[int, str]]:
        """The open folder of a package, and its name there; what the block raises becomes the store's."""
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
            if names[: len(self._root_names)] != self._root_names:
                raise PackageUnusable("the path leads out of the storage root")
            names = names[len(self._root_names) :]
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
    return OpenPackage(descriptor, status.st_size, status.st_dev, status.st_ino, status.st_mtime_ns)
