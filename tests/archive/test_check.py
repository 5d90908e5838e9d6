"""Ready archives come from anybody: reading them costs little memory and time, and ends."""

import functools
import gzip
import io
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from exportd.archive import check
from exportd.archive.check import check_archive
from exportd.archive.source import PackError
from tests.support.daemon import wait_for


def header(name: str, kind: bytes, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def archive_of(*blocks: bytes) -> bytes:
    return gzip.compress(b"".join(blocks) + bytes(1024))


@functools.cache
def slow_archive() -> bytes:
    """A sound one of very many members: tarfile needs several seconds for them, in any version of Python."""
    return gzip.compress(header("x", b"0", 0) * 300_000 + bytes(1024), compresslevel=1)


GIB = 1024**3
HOSTILE = {
    "a pax header of a gibibyte": archive_of(header("x", tarfile.XHDTYPE, GIB), bytes(2_000_000)),
    "a global pax header of a gibibyte": archive_of(header("x", tarfile.XGLTYPE, GIB), bytes(2_000_000)),
    "a long name of a gibibyte": archive_of(header("x", tarfile.GNUTYPE_LONGNAME, GIB), bytes(2_000_000)),
    "a long link of a gibibyte": archive_of(header("x", tarfile.GNUTYPE_LONGLINK, GIB), bytes(2_000_000)),
    "a long name just over the limit": archive_of(
        header("x", tarfile.GNUTYPE_LONGNAME, 1024 * 1024 + 1), bytes(2_000_000)
    ),
}


def checked(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ready.tar.gz"
    path.write_bytes(content)
    with path.open("rb") as file:
        check_archive(file, path, lambda _: None)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_MAX_MEMORY_BYTES", 128 * 1024 * 1024)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", HOSTILE)
def test_an_extended_header_that_is_too_large_is_refused_before_it_is_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"extended header has \d+ bytes") as caught:
        checked(HOSTILE[name], tmp_path)
    assert caught.value.is_final
    assert caught.value.public == "Its source is no sound .tar.gz"


def test_long_names_are_sound(tmp_path: Path) -> None:
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz", format=form) as archive:
            archive.addfile(tarfile.TarInfo("long/" * 10_000 + "name"))
        checked(buffer.getvalue(), tmp_path)


def test_an_archive_that_takes_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_MIN_CPU_SECONDS", 1)
    with pytest.raises(PackError, match=r"takes more than \d s of processor time"):
        checked(slow_archive(), tmp_path)


@pytest.mark.usefixtures("little_memory")
def test_an_archive_that_takes_much_memory_is_refused(tmp_path: Path) -> None:
    """Each of its headers is allowed, but tarfile keeps what all of them say."""
    blocks = []
    for number in range(100):
        content = b"".join(b"1000 k%06d=%s\n" % (number * 1000 + each, b"v" * 986) for each in range(1000))
        blocks += [header("x", tarfile.XGLTYPE, len(content)), padded(content)]
    with pytest.raises(PackError, match="takes more than 134217728 bytes of memory"):
        checked(archive_of(*blocks, header("x", b"0", 0)), tmp_path)


@pytest.mark.usefixtures("little_memory")
def test_a_member_of_zeros_is_sound_and_takes_no_memory(tmp_path: Path) -> None:
    size = 300_000_000
    path = tmp_path / "ready.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header("zeros", b"0", size))
        for _ in range(size // 1_000_000):
            file.write(bytes(1_000_000))
        file.write(bytes(-size % 512 + 1024))
    assert path.stat().st_size < size / 100
    with path.open("rb") as opened:
        check_archive(opened, path, lambda _: None)


def test_a_cancelled_check_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ready.tar.gz"
    path.write_bytes(slow_archive())

    def give_up(_: int) -> None:
        raise KeyboardInterrupt

    with path.open("rb") as file, pytest.raises(KeyboardInterrupt):
        check_archive(file, path, give_up)
    assert not checks_of(os.getpid())


def checks_of(parent: int) -> list[int]:
    """The processes that check an archive for that one."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes()
                status = (folder / "status").read_text()
            except OSError:
                continue
            if b"archive/check.py" in command and f"PPid:\t{parent}\n" in status:
                found.append(int(folder.name))
    return found


def is_running(process: int) -> bool:
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except OSError:
        return False


def test_a_killed_packer_takes_its_check_along(tmp_path: Path) -> None:
    path = tmp_path / "ready.tar.gz"
    path.write_bytes(slow_archive())
    program = (
        "import sys; from pathlib import Path; from exportd.archive.check import check_archive;"
        "path = Path(sys.argv[1]); check_archive(path.open('rb'), path, lambda _: None)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, path])
    (child,) = wait_for("the check", lambda: checks_of(process.pid))
    process.send_signal(signal.SIGKILL)
    process.wait()
    # A process that no parent waits for stays as a zombie, without a command line.
    wait_for("its end", lambda: not is_running(child))


def test_the_check_knows_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPORTD_AUTH__SECRET", "x" * 40)
    path = tmp_path / "ready.tar.gz"
    path.write_bytes(slow_archive())
    environments: list[bytes] = []

    def look(_: int) -> None:
        for child in checks_of(os.getpid()):
            environments.append(Path(f"/proc/{child}/environ").read_bytes())
            raise KeyboardInterrupt

    with path.open("rb") as file, pytest.raises(KeyboardInterrupt):
        check_archive(file, path, look)
    assert environments
    assert not any(b"EXPORTD_" in environment for environment in environments)
