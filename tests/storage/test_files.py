import errno
import os
import resource
import socket
import stat
import tempfile
import threading
from pathlib import Path

import pytest

from exportd.storage.files import PackageMissing, PackageStore, PackageUnusable

CONTENT = b"a package"


@pytest.fixture
def store(storage: Path) -> PackageStore:
    (storage / "a.tar.gz").write_bytes(CONTENT)
    (storage / "year" / "month").mkdir(parents=True)
    (storage / "year" / "month" / "b.tar.gz").write_bytes(CONTENT)
    return PackageStore(storage)


def open_descriptors() -> set[str]:
    # The descriptor that reads the folder is listed too, and closed by now.
    return {path.name for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}


@pytest.mark.parametrize("path", ["a.tar.gz", "year/month/b.tar.gz", "./a.tar.gz"])
def test_a_package_opens_with_what_is_true_of_it(store: PackageStore, storage: Path, path: str) -> None:
    before = open_descriptors()
    with store.open(path, len(CONTENT)) as package:
        assert os.pread(package.descriptor, 100, 0) == CONTENT
        status = (storage / path).stat()
        assert (package.size_bytes, package.modified_ns) == (len(CONTENT), status.st_mtime_ns)
        assert not os.get_inheritable(package.descriptor)
    assert open_descriptors() == before


def test_an_absolute_path_inside_the_root_is_fine(store: PackageStore, storage: Path) -> None:
    with store.open(str(storage / "a.tar.gz"), None) as package:
        assert package.size_bytes == len(CONTENT)


def test_an_open_package_outlives_its_name(store: PackageStore, storage: Path) -> None:
    with store.open("a.tar.gz", None) as package:
        (storage / "a.tar.gz").unlink()
        assert os.pread(package.descriptor, 100, 0) == CONTENT


@pytest.mark.parametrize("path", ["nowhere.tar.gz", "nowhere/a.tar.gz"])
def test_a_file_that_is_not_there_is_missing(store: PackageStore, path: str) -> None:
    with pytest.raises(PackageMissing):
        store.open(path, None)


@pytest.mark.parametrize(
    "path",
    [
        "../secret",
        "year/../../secret",
        "year/..",
        "..",
        "",
        ".",
        "/",
        "/etc/passwd",
        "a\0b",
        "../packages/a.tar.gz",
    ],
)
def test_a_path_out_of_the_root_is_refused(store: PackageStore, storage: Path, path: str) -> None:
    (storage.parent / "secret").write_bytes(CONTENT)
    before = open_descriptors()
    with pytest.raises(PackageUnusable):
        store.open(path, None)
    assert open_descriptors() == before


def test_symbolic_links_are_not_followed_at_any_level(store: PackageStore, storage: Path) -> None:
    outside = storage.parent / "outside"
    outside.mkdir()
    (outside / "a.tar.gz").write_bytes(CONTENT)
    (storage / "file.tar.gz").symlink_to(outside / "a.tar.gz")
    (storage / "folder").symlink_to(outside)
    (storage / "inside.tar.gz").symlink_to("a.tar.gz")
    for path in ("file.tar.gz", "folder/a.tar.gz", "inside.tar.gz"):
        with pytest.raises(PackageUnusable):
            store.open(path, None)


def test_only_regular_files_are_opened_and_no_open_hangs(store: PackageStore, storage: Path) -> None:
    os.mkfifo(storage / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        folder = os.open(storage, os.O_RDONLY)
        listener.bind(f"/proc/self/fd/{folder}/socket")
        os.close(folder)
        before = open_descriptors()
        for path in ("fifo", "socket", "year"):
            with pytest.raises(PackageUnusable):
                store.open(path, None)
        assert open_descriptors() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a device")
def test_a_device_is_refused(store: PackageStore, storage: Path) -> None:
    try:
        os.mknod(storage / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("this sandbox lets nobody make a device")
    with pytest.raises(PackageUnusable):
        store.open("zero", None)


@pytest.mark.parametrize("expected", [len(CONTENT) - 1, len(CONTENT) + 1, 0])
def test_another_size_than_recorded_is_refused(store: PackageStore, expected: int) -> None:
    before = open_descriptors()
    with pytest.raises(PackageUnusable, match=f"{len(CONTENT)} bytes on disk, {expected} recorded"):
        store.open("a.tar.gz", expected)
    assert open_descriptors() == before


def test_a_root_that_is_gone_is_an_outage_not_a_missing_package(store: PackageStore, storage: Path) -> None:
    storage.rename(storage.with_name("elsewhere"))
    with pytest.raises(PackageUnusable, match="storage root"):
        store.open("a.tar.gz", None)
    assert not store.is_ready()


def test_no_descriptor_left_is_an_outage_not_a_missing_package(store: PackageStore) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The next descriptor would be the first above the highest one that is open.
    highest = max(int(name) for name in open_descriptors())
    filler = [os.open(os.devnull, os.O_RDONLY) for _ in range(highest)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(filler) + 1, hard))
        with pytest.raises(PackageUnusable, match="Too many open files"):
            store.open("a.tar.gz", None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in filler:
            os.close(descriptor)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENFILE, errno.ESTALE])
def test_any_other_error_of_the_system_is_an_outage(
    store: PackageStore, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def failing(path: object, *arguments: object, **options: object) -> int:
        if path == "a.tar.gz":
            raise OSError(number, os.strerror(number))
        return real(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", failing)
    before = open_descriptors()
    with pytest.raises(PackageUnusable, match=os.strerror(number)):
        store.open("a.tar.gz", None)
    assert open_descriptors() == before


def test_ready_means_the_root_can_be_entered(store: PackageStore) -> None:
    assert store.is_ready()


def test_a_file_that_may_not_be_read_is_an_outage_not_a_missing_package() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        (root / "a.tar.gz").write_bytes(CONTENT)
        (root / "a.tar.gz").chmod(0)
        uid = os.geteuid()
        try:
            if uid == 0:  # root may read everything
                os.seteuid(65534)
            with pytest.raises(PackageUnusable, match="Permission denied"):
                PackageStore(root).open("a.tar.gz", None)
        finally:
            os.seteuid(uid)


@pytest.mark.parametrize(
    "name", ["x" * 255, "x" * 256, "x" * 5000, "y/" * 2100 + "a", "\udcff\udcfe", "\u202e.gz"]
)
def test_a_strange_name_is_missing_or_refused(store: PackageStore, name: str) -> None:
    before = open_descriptors()
    with pytest.raises((PackageMissing, PackageUnusable)):
        store.open(name, None)
    assert open_descriptors() == before


@pytest.mark.parametrize("level", ["year", "year/month", "year/month/b.tar.gz"])
def test_a_link_that_is_swapped_in_meanwhile_is_never_followed(
    store: PackageStore, storage: Path, tmp_path: Path, level: str
) -> None:
    """Another thread swaps the real thing and a link to the outside as fast as it can."""
    outside = tmp_path / "outside"
    (outside / "month").mkdir(parents=True)
    for path in (outside / "month" / "b.tar.gz", outside / "b.tar.gz"):
        path.write_bytes(b"a secret!")
    target = {"year": outside, "year/month": outside, "year/month/b.tar.gz": outside / "b.tar.gz"}[level]
    link, spare = storage / "link", storage / "spare"
    link.symlink_to(target)
    is_over = threading.Event()

    def swap() -> None:
        while not is_over.is_set():
            (storage / level).rename(spare)
            link.rename(storage / level)
            (storage / level).rename(link)
            spare.rename(storage / level)

    thread = threading.Thread(target=swap)
    thread.start()
    opened = refused = 0
    try:
        while opened < 200 or refused < 200:
            try:
                with store.open("year/month/b.tar.gz", None) as package:
                    assert os.pread(package.descriptor, 100, 0) == CONTENT
                    opened += 1
            except (PackageMissing, PackageUnusable):
                refused += 1
    finally:
        is_over.set()
        thread.join()
