"""A source is packed from the inside: no name that changes meanwhile leads out of it."""

import os
import subprocess
import sys
import tarfile
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from exportd.archive.pack import draft_package
from exportd.archive.source import PackError, open_source
from tests.archive.test_pack import drafted, left_in, publish

SECRET = "the daemon's signing secret"


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """What a source must not lead to."""
    folder = tmp_path / "secrets"
    (folder / "inner").mkdir(parents=True)
    (folder / "data.txt").write_text(SECRET)
    (folder / "inner" / "data.txt").write_text(SECRET)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "first.bin").write_bytes(bytes(3_000_000))
    (folder / "b" / "inner").mkdir(parents=True)
    (folder / "b" / "data.txt").write_text("mine")
    (folder / "b" / "inner" / "data.txt").write_text("mine")
    return folder


def contents(package: Path) -> dict[str, bytes]:
    with tarfile.open(package) as archive:
        files = [member for member in archive if member.isreg()]
        return {member.name: archive.extractfile(member).read() for member in files}  # type: ignore[union-attr]


def swap_folder(source: Path, secrets: Path) -> None:
    (source / "b").rename(source.parent / "elsewhere")
    (source / "b").symlink_to(secrets)


def swap_inner_folder(source: Path, secrets: Path) -> None:
    (source / "b" / "inner").rename(source.parent / "elsewhere")
    (source / "b" / "inner").symlink_to(secrets)


def swap_file(source: Path, secrets: Path) -> None:
    (source / "b" / "data.txt").unlink()
    (source / "b" / "data.txt").symlink_to(secrets / "data.txt")


def swap_top(source: Path, secrets: Path) -> None:
    source.rename(source.parent / "elsewhere")
    source.symlink_to(secrets)


def swap_for_a_fifo(source: Path, _: Path) -> None:
    (source / "b" / "data.txt").unlink()
    os.mkfifo(source / "b" / "data.txt")


@pytest.mark.parametrize("swap", [swap_folder, swap_inner_folder, swap_file, swap_top, swap_for_a_fifo])
def test_a_symlink_that_replaces_a_name_during_packing_is_not_followed(
    source: Path, secrets: Path, storage: Path, swap: Callable[[Path, Path], None]
) -> None:
    has_begun = False

    def progress(count: int) -> None:
        nonlocal has_begun
        if count and not has_begun:
            has_begun = True
            swap(source, secrets)

    packages = []
    try:
        with drafted(source, storage, progress) as draft:
            draft.place()
            draft.keep()
            packages.append(storage / draft.path)
    except PackError:
        assert left_in(storage) == []
    assert has_begun
    for package in packages:
        assert set(contents(package).values()) == {bytes(3_000_000), b"mine"}


@pytest.mark.parametrize("name", ["a", "a/first.bin"])
def test_a_symlink_that_replaces_the_source_before_its_open_is_not_followed(
    source: Path, secrets: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    resolve = Path.resolve

    def resolve_and_swap(path: Path, strict: bool = False) -> Path:
        resolved = resolve(path, strict)
        (source / "a").rename(source.parent / "elsewhere")
        (source / "a").symlink_to(secrets)
        return resolved

    monkeypatch.setattr(Path, "resolve", resolve_and_swap)
    with pytest.raises(PackError), open_source(source / name, [source.parent]):
        pass


def test_a_source_that_leads_out_of_its_roots_is_refused(source: Path, secrets: Path) -> None:
    (source / "out").symlink_to(secrets)
    with pytest.raises(PackError, match="source_roots"), open_source(source / "out", [source]):
        pass
    with pytest.raises(PackError, match="source_roots"), open_source(source / ".." / "secrets", [source]):
        pass
    with open_source(source / "a", [source]) as opened:
        assert opened.measure() == 3_000_000


def grow(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"more")


def overwrite(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.write(b"x")


def truncate(file: Path) -> None:
    os.truncate(file, 10)


@pytest.mark.parametrize("change", [grow, overwrite, truncate])
def test_a_file_that_changes_while_it_is_packed_fails_the_attempt(
    source: Path, storage: Path, change: Callable[[Path], None]
) -> None:
    def progress(count: int) -> None:
        if count:
            change(source / "a" / "first.bin")

    with (
        pytest.raises(PackError, match=r"a/first\.bin changed while it was packed") as caught,
        drafted(source, storage, progress),
    ):
        pass
    # The packer tries again.
    assert not caught.value.is_final
    assert left_in(storage) == []


def test_a_folder_that_changes_while_it_is_packed_fails_the_attempt(source: Path, storage: Path) -> None:
    def progress(count: int) -> None:
        if count:
            (source / "a" / "new").touch()

    with pytest.raises(PackError, match="a/ changed while it was packed"), drafted(source, storage, progress):
        pass


def test_a_ready_package_that_changes_while_it_is_copied_fails_the_attempt(
    source: Path, storage: Path, tmp_path: Path
) -> None:
    ready = tmp_path / "ready.tar.gz"
    with tarfile.open(ready, "w:gz") as archive:
        archive.add(source, "export")

    def progress(count: int) -> None:
        if count:
            grow(ready)

    with (
        pytest.raises(PackError, match=r"ready\.tar\.gz changed while it was packed"),
        drafted(ready, storage, progress),
    ):
        pass


def test_a_ready_package_is_opened_once(source: Path, secrets: Path, storage: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready.tar.gz"
    with tarfile.open(ready, "w:gz") as archive:
        archive.add(source, "export")
    expected = ready.read_bytes()
    with open_source(ready) as opened:
        ready.unlink()
        ready.symlink_to(secrets / "data.txt")
        with draft_package(opened, storage, uuid.uuid4(), lambda _: None) as draft:
            draft.place()
            draft.keep()
    assert (storage / draft.path).read_bytes() == expected


def test_a_package_tells_nothing_of_the_servers_users(source: Path, storage: Path) -> None:
    with tarfile.open(storage / publish(source, storage).path) as archive:
        assert {(each.uid, each.gid, each.uname, each.gname) for each in archive} == {(0, 0, "", "")}


def test_a_tree_deeper_than_paths_and_descriptors_allow_is_packed(storage: Path, tmp_path: Path) -> None:
    depth = 1500
    top = tmp_path / "deep"
    top.mkdir()
    descriptor = os.open(top, os.O_RDONLY)
    for level in range(depth):
        os.mkdir("folder", dir_fd=descriptor)
        inner = os.open("folder", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
        if level % 500 == 0:
            os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=descriptor))
    os.close(descriptor)
    package = storage / publish(top, storage).path
    with tarfile.open(package) as archive:
        names = archive.getnames()
    assert len(names) == 1 + depth + 3
    assert max(name.count("/") for name in names) == depth
    # pytest's own clean-up cannot.
    subprocess.run(["rm", "-rf", top], check=True)


_MEASURE_MEMORY = """
import resource, sys, uuid
from pathlib import Path
from exportd.archive.pack import draft_package
from exportd.archive.source import open_source
with open_source(Path(sys.argv[1])) as source:
    with draft_package(source, Path(sys.argv[2]), uuid.uuid4(), lambda _: None):
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_memory_kib(source: Path, storage: Path) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE_MEMORY, source, storage], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_memory_is_flat_for_very_many_files_in_one_folder(tmp_path: Path, storage: Path) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    for folder, count in ((few, 1000), (many, 300_000)):
        folder.mkdir()
        descriptor = os.open(folder, os.O_RDONLY)
        for number in range(count):
            os.close(os.open(f"a-file-with-a-name-{number}", os.O_WRONLY | os.O_CREAT, dir_fd=descriptor))
        os.close(descriptor)
    assert peak_memory_kib(many, storage) < peak_memory_kib(few, storage) + 8 * 1024
