import contextlib
import gzip
import hashlib
import io
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from exportd.archive.pack import DraftPackage, draft_package, remove_abandoned
from exportd.archive.source import PackError, open_source


def ignore(_: int) -> None:
    pass


def left_in(storage: Path) -> list[str]:
    """Every file below the storage root."""
    return sorted(str(path.relative_to(storage)) for path in storage.rglob("*") if path.is_file())


@contextlib.contextmanager
def drafted(path: Path, storage: Path, progress: Callable[[int], object] = ignore) -> Iterator[DraftPackage]:
    with (
        open_source(path) as source,
        draft_package(source, storage, uuid.uuid4(), progress) as draft,  # type: ignore[arg-type]
    ):
        yield draft


def measure(path: Path) -> int:
    with open_source(path) as source:
        return source.measure()


def publish(source: Path, storage: Path) -> DraftPackage:
    with drafted(source, storage) as draft:
        draft.place()
        draft.keep()
    return draft


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "export"
    (source / "sub" / "empty").mkdir(parents=True)
    (source / "hello.txt").write_text("hello")
    (source / "sub" / "noise.bin").write_bytes(random.Random(1).randbytes(3_000_000))
    (source / "zero").touch()
    (source / "link").symlink_to("hello.txt")
    (source / "dangling").symlink_to("nowhere")
    os.link(source / "hello.txt", source / "sub" / "hard")
    (source / ("long" * 60)).write_text("a long name")
    (source / "ünïcödé 你好").write_text("a name")
    return source


def test_a_folder_comes_back_as_it_was(folder: Path, storage: Path, tmp_path: Path) -> None:
    draft = publish(folder, storage)
    assert left_in(storage) == [draft.path]
    package = storage / draft.path
    assert package.stat().st_size == draft.size_bytes
    assert hashlib.sha256(package.read_bytes()).hexdigest() == draft.sha256
    subprocess.run(["gzip", "-t", package], check=True)
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(["tar", "xzf", package, "-C", out], check=True)
    subprocess.run(["diff", "-r", "--no-dereference", folder, out / "export"], check=True)
    assert (out / "export" / "hello.txt").stat().st_ino == (out / "export" / "sub" / "hard").stat().st_ino


def test_progress_adds_up_to_what_was_measured(folder: Path, storage: Path) -> None:
    read: list[int] = []
    with drafted(folder, storage, read.append):
        pass
    # The second name of a hard link is measured and not read again.
    assert measure(folder) - sum(read) == len("hello")


def test_memory_does_not_grow_with_the_number_of_files(tmp_path: Path, storage: Path) -> None:
    source = tmp_path / "many"
    source.mkdir()
    for number in range(3000):
        (source / f"{number}").touch()
    kept: list[int] = []
    real = tarfile.TarFile.addfile

    def counting(archive: tarfile.TarFile, *arguments: object) -> None:
        real(archive, *arguments)  # type: ignore[arg-type]
        kept.append(len(archive.members) + len(archive.inodes))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", counting)
        publish(source, storage)
    assert len(kept) == 3001
    assert max(kept) <= 2


def test_a_ready_package_is_taken_byte_for_byte(folder: Path, storage: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready.tar.gz"
    with tarfile.open(ready, "w:gz") as archive:
        archive.add(folder, "export")
    draft = publish(ready, storage)
    assert (storage / draft.path).read_bytes() == ready.read_bytes()
    assert draft.sha256 == hashlib.sha256(ready.read_bytes()).hexdigest()


def sound_package() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo("noise")
        member.size = 200_000
        archive.addfile(member, io.BytesIO(random.Random(2).randbytes(200_000)))
    return buffer.getvalue()


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


UNSOUND = {
    "empty": b"",
    "no gzip": b"hello" * 1000,
    "gzip of no tar": gzip.compress(b"x" * 10_000),
    "truncated at the end": sound_package()[:-1],
    "truncated in the middle": sound_package()[:100_000],
    "a flipped bit": flipped(sound_package(), 100_000),
    "a wrong checksum": flipped(sound_package(), len(sound_package()) - 8),
    "garbage behind": sound_package() + b"garbage",
}


@pytest.mark.parametrize("name", UNSOUND)
def test_an_unsound_package_is_refused(name: str, storage: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready.tar.gz"
    ready.write_bytes(UNSOUND[name])
    with pytest.raises(PackError, match=r"ready\.tar\.gz is no sound \.tar\.gz"):
        publish(ready, storage)
    assert left_in(storage) == []


def test_a_path_that_does_not_exist_is_named(tmp_path: Path, storage: Path) -> None:
    with pytest.raises(PackError, match="nowhere: No such file or directory"):
        measure(tmp_path / "nowhere")
    with pytest.raises(PackError, match="nowhere"):
        publish(tmp_path / "nowhere", storage)
    assert left_in(storage) == []


def test_special_files_are_refused_and_never_hang(folder: Path, storage: Path) -> None:
    os.mkfifo(folder / "sub" / "fifo")
    for attempt in (lambda: measure(folder), lambda: publish(folder, storage)):
        with pytest.raises(PackError, match="sub/fifo is neither a file, a folder nor a symbolic link"):
            attempt()
    with pytest.raises(PackError, match="fifo is neither"):
        measure(folder / "sub" / "fifo")
    assert left_in(storage) == []


def test_an_unreadable_file_inside_the_folder_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:
        source, storage = Path(name) / "export", Path(name) / "packages"
        for folder in (Path(name), source, storage):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o777)
        (source / "secret").touch(mode=0)
        uid = os.geteuid()
        try:
            if uid == 0:  # root may read everything
                os.seteuid(65534)
            with pytest.raises(PackError, match="secret: Permission denied"):
                publish(source, storage)
        finally:
            os.seteuid(uid)
        assert left_in(storage) == []


def test_a_folder_around_the_storage_is_refused(storage: Path) -> None:
    with pytest.raises(PackError, match="would be packed into itself"):
        publish(storage.parent, storage)


def test_a_file_that_shrinks_while_it_is_packed_is_an_error(folder: Path, storage: Path) -> None:
    def shrink(count: int) -> None:
        if count > 1000:  # the first block of noise.bin
            os.truncate(folder / "sub" / "noise.bin", 100)

    with (
        pytest.raises(PackError, match=r"sub/noise\.bin changed while it was packed"),
        drafted(folder, storage, shrink),
    ):
        pass
    assert left_in(storage) == []


def test_a_full_disk_leaves_nothing(folder: Path, storage: Path) -> None:
    # A limit on the size of files fails a write half-way, as a full disk does.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(PackError, match=r"packing .*: File too large"):
            publish(folder, storage)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left_in(storage) == []


@pytest.mark.parametrize("placed", [False, True])
def test_a_failure_in_the_block_leaves_nothing(folder: Path, storage: Path, placed: bool) -> None:
    with pytest.raises(KeyboardInterrupt), drafted(folder, storage) as draft:
        if placed:
            draft.place()
            assert left_in(storage) == [draft.path]
        raise KeyboardInterrupt
    assert left_in(storage) == []


def test_an_interrupt_while_packing_leaves_nothing(folder: Path, storage: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), drafted(folder, storage, interrupt):
        pass
    assert left_in(storage) == []


def test_a_draft_that_is_not_kept_is_removed(folder: Path, storage: Path) -> None:
    with drafted(folder, storage) as draft:
        draft.place()
    assert left_in(storage) == []


def test_the_next_packer_removes_files_of_a_killed_one(folder: Path, storage: Path) -> None:
    code = (
        "import os, signal, sys, uuid; from pathlib import Path;"
        "from exportd.archive.pack import draft_package;"
        "from exportd.archive.source import open_source;"
        "opening = open_source(Path(sys.argv[1])); source = opening.__enter__();"
        "context = draft_package(source, Path(sys.argv[2]), uuid.uuid4(), lambda _: None);"
        "context.__enter__(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, folder, storage], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(left_in(storage)) == 1

    with drafted(folder, storage):
        # The killed one's file is gone; this one's is locked, so nobody else removes it.
        assert len(left_in(storage)) == 1
        assert remove_abandoned(storage) == 0
        assert len(left_in(storage)) == 1
