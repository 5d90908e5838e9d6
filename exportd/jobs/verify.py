"""Verification of packages: reads each one and compares its SHA-256 with the recorded one.

It runs at idle priority and does not evict the downloads' pages from the page cache.
"""

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from uuid import UUID

import psutil
import structlog

from exportd.db.pool import Database, DatabaseError
from exportd.db.verification import RecordedPackage, list_packages, mark_sound, mark_suspect
from exportd.storage.files import OpenPackage, PackageChanged, PackageMissing, PackageStore, PackageUnusable

log = structlog.get_logger()

_READ_BYTES = 1024 * 1024


@dataclass(slots=True)
class Verification:
    """The number of packages by result. ``unknown``: no digest was recorded."""

    sound: int = 0
    damaged: int = 0
    missing: int = 0
    unreadable: int = 0
    unknown: int = 0
    bytes_read: int = 0


def become_idle() -> None:
    """Gives other processes priority on the processor and the disk, as far as the system can."""
    process = psutil.Process()
    with contextlib.suppress(psutil.Error, OSError):
        process.nice(19)
    with contextlib.suppress(AttributeError, psutil.Error, OSError):
        process.ionice(psutil.IOPRIO_CLASS_IDLE)


async def verify_packages(database: Database, store: PackageStore, job_id: UUID | None) -> Verification:
    """Verifies the package of one job, or all packages. Marks damaged ones as suspect, and clears the mark of
    sound ones.

    Raises DatabaseUnavailable, and OSError if it concerns more than one package.
    """
    found = Verification()
    async for package in _packages(database, job_id):
        fields = {"job_id": str(package.job_id)}
        try:
            digest = await asyncio.to_thread(_digest, store, package)
        except PackageMissing:
            found.missing += 1
            log.error("package_missing", **fields)
            continue
        except PackageChanged as error:
            digest = str(error)
        except PackageUnusable as error:
            found.unreadable += 1
            log.error("package_unreadable", reason=str(error), **fields)
            continue
        found.bytes_read += package.size_bytes or 0
        if package.sha256 is None:
            found.unknown += 1
            if package.has_digest:
                log.warning("package_digest_unusable", **fields)
        elif digest == package.sha256:
            found.sound += 1
            if package.is_suspect and await mark_sound(database, package):
                log.warning("package_cleared", **fields)
        else:
            found.damaged += 1
            await mark_suspect(database, package)
            log.error("package_damaged", found=digest, recorded=package.sha256, **fields)
    return found


class SuspectPackages:
    """Packages that changed during a download. Verifies them one after the other: perhaps only the file's
    time has changed."""

    def __init__(self, database: Database, store: PackageStore) -> None:
        self._database = database
        self._store = store
        self._queue: asyncio.Queue[UUID] = asyncio.Queue()

    def add(self, job_id: UUID) -> None:
        """Adds the package of a job, which is marked as suspect."""
        self._queue.put_nowait(job_id)

    async def run(self) -> None:
        """Verifies what is added, until it is cancelled."""
        while True:
            job_id = await self._queue.get()
            try:
                await verify_packages(self._database, self._store, job_id)
            except (DatabaseError, OSError) as error:
                log.error("package_not_verified", job_id=str(job_id), error=str(error))


async def _packages(database: Database, job_id: UUID | None) -> AsyncIterator[RecordedPackage]:
    after: UUID | None = None
    while packages := await list_packages(database, job_id, after):
        for package in packages:
            yield package
        after = packages[-1].job_id


def _digest(store: PackageStore, package: RecordedPackage) -> str:
    with store.open(package.package_path, None) as opened:
        if package.size_bytes is not None and opened.size_bytes != package.size_bytes:
            raise PackageChanged(f"{opened.size_bytes} bytes in place of {package.size_bytes}")
        try:
            return _hash(opened)
        except OSError as error:
            raise PackageUnusable(error.strerror or str(error)) from error


def _hash(package: OpenPackage) -> str:
    digest = hashlib.sha256()
    offset = 0
    while data := os.pread(package.descriptor, _READ_BYTES, offset):
        digest.update(data)
        os.posix_fadvise(package.descriptor, offset, len(data), os.POSIX_FADV_DONTNEED)
        offset += len(data)
    return digest.hexdigest()
