"""Checks ready archives, which may be hostile, in a child process with limits on memory and processor time.

This file is also the child process: as a script it reads its standard input and imports no other room.
"""

import os
import resource
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

_MAX_MEMORY_BYTES = 512 * 1024 * 1024
# A compressed kilobyte of zeros takes a millisecond of processor time.
_MIN_CPU_SECONDS = 20
_BYTES_PER_CPU_SECOND = 1024 * 1024
# Names and other attributes of one member.
_MAX_EXTENDED_HEADER_BYTES = 1024 * 1024
_EXTENDED_HEADERS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
_READ_BYTES = 1024 * 1024
_WAIT_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1
_SIGKILL = 9


def check_archive(file: IO[bytes], path: Path, progress: Callable[[int], None]) -> None:
    """Reads ``file`` to its end as gzip and as tar. ``path`` is for messages.

    Calls ``progress`` with 0 meanwhile, which may raise to stop. Raises PackError, and OSError.
    """
    # Imported here, because the child process runs this file too and needs no settings.
    from exportd.settings import child_environment

    file.seek(0)
    size_bytes = os.fstat(file.fileno()).st_size
    cpu_seconds = _MIN_CPU_SECONDS + size_bytes // _BYTES_PER_CPU_SECOND
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-I", __file__, str(os.getpid()), str(cpu_seconds), str(_MAX_MEMORY_BYTES)],
        stdin=file,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=child_environment(os.environ),
    )
    with process:
        try:
            while process.poll() is None:
                progress(0)
                try:
                    process.wait(_WAIT_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            process.kill()
        assert process.stdout is not None
        reason = process.stdout.read().decode(errors="replace").strip()
    if process.returncode < 0:
        raise _unsound(path, f"reading it takes more than {cpu_seconds} s of processor time")
    if process.returncode:
        raise _unsound(path, reason or "it cannot be read")


def _unsound(path: Path, reason: str) -> Exception:
    # Imported here, because the script imports no other room.
    from exportd.archive.source import PackError

    return PackError(
        f"{path} is no sound .tar.gz: {reason}", is_final=True, public="Its source is no sound .tar.gz"
    )


class _Unsound(Exception):
    """The archive is not acceptable as a package."""


class _Member(tarfile.TarInfo):
    """A member whose large extended header is rejected before tarfile reads it into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        member = super().frombuf(buf, encoding, errors)
        if member.type in _EXTENDED_HEADERS and not 0 <= member.size <= _MAX_EXTENDED_HEADER_BYTES:
            raise _Unsound(f"a member's extended header has {member.size} bytes")
        if member.size < 0:
            raise _Unsound(f"a member has {member.size} bytes")
        return member


def _read(file: IO[bytes]) -> None:
    """Raises an exception if the archive is damaged."""
    from isal import igzip

    with (
        igzip.open(file, "rb") as content,  # type: ignore[no-untyped-call]
        tarfile.open(fileobj=content, mode="r|", tarinfo=_Member) as archive,
    ):
        while archive.next() is not None:
            archive.members.clear()  # type: ignore[attr-defined]
        while content.read(_READ_BYTES):
            pass


def _main() -> None:
    import ctypes

    parent, cpu_seconds, memory_bytes = map(int, sys.argv[1:])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    # The parent may have died before PR_SET_PDEATHSIG was set.
    if os.getppid() != parent:
        sys.exit(1)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    try:
        with open(0, "rb") as file:
            _read(file)
    except MemoryError:
        sys.exit(_say(f"reading it takes more than {memory_bytes} bytes of memory"))
    except Exception as error:  # noqa: BLE001  any failure is a reason to refuse the archive
        sys.exit(_say(str(error) or type(error).__name__))


def _say(reason: str) -> int:
    sys.stdout.write(" ".join(reason.split())[:500])
    return 1


if __name__ == "__main__":
    _main()
