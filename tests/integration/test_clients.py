"""Real clients download, are cut, and resume."""

import hashlib
import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from email.parser import BytesParser
from pathlib import Path

import pytest

from tests.support.application import ANN, Jobs, Package, noise
from tests.support.daemon import Daemon, Exportd, wait_for
from tests.support.postgres import query
from tests.support.programs import require
from tests.support.proxy import CuttingProxy

SIZE = 20_000_003
AUTHORIZATION = f"Authorization: {ANN['Authorization']}"


class Scene:
    """A running daemon, a package, and a folder to download into."""

    def __init__(self, exportd: Exportd, way: str, folder: Path) -> None:
        self.exportd = exportd
        self.way = way
        exportd.storage.mkdir(parents=True)
        self.jobs = Jobs(exportd.dsn, exportd.storage)
        self.folder = folder
        self.daemon = self.serve()

    def serve(self) -> Daemon:
        return self.exportd.serve(EXPORTD_DOWNLOAD__SENDFILE=str(self.way == "sendfile").lower())

    def address(self, package: Package, port: int | None = None) -> str:
        return f"http://127.0.0.1:{port or self.daemon.port}{package.url}"

    def run(self, *command: str, statuses: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run(command, cwd=self.folder, capture_output=True, timeout=100, check=False)
        assert done.returncode in statuses, done.stderr.decode()
        return done


@pytest.fixture(params=["sendfile", "chunks"])
def scene(request: pytest.FixtureRequest, exportd: Exportd, tmp_path: Path) -> Iterator[Scene]:
    folder = tmp_path / "downloads"
    folder.mkdir()
    scene = Scene(exportd, request.param, folder)
    yield scene
    methods = {line["method"] for line in scene.daemon.events("download_completed")}
    assert methods <= {request.param}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_curl_resumes_what_it_has(scene: Scene) -> None:
    curl = require("curl")
    package = scene.jobs.add(noise(SIZE))
    file = scene.folder / "p.tar.gz"
    for have in (1, SIZE // 2, SIZE - 1):
        file.write_bytes(package.content[:have])
        scene.run(curl, "-sSf", "-C", "-", "-o", file.name, "-H", AUTHORIZATION, scene.address(package))
        assert sha256(file.read_bytes()) == sha256(package.content)
    # Of a complete file nothing is left: 416, which curl calls an error and leaves the file alone.
    scene.run(
        curl, "-sSf", "-C", "-", "-o", file.name, "-H", AUTHORIZATION, scene.address(package), statuses=(22,)
    )
    assert sha256(file.read_bytes()) == sha256(package.content)


def test_curl_asks_for_a_list_of_ranges(scene: Scene) -> None:
    curl = require("curl")
    package = scene.jobs.add(noise(SIZE))
    command = (
        curl,
        "-sSf",
        "-D",
        "head",
        "-r",
        "0-9,1000000-1999999,-7",
        "-H",
        AUTHORIZATION,
        scene.address(package),
    )
    body = scene.run(*command).stdout
    head = (scene.folder / "head").read_bytes().partition(b"\r\n")[2]
    message = BytesParser().parsebytes(head + body)
    parts = [part.get_payload(decode=True) for part in message.get_payload()]  # type: ignore[union-attr]
    assert parts == [package.content[:10], package.content[1_000_000:2_000_000], package.content[-7:]]


def test_wget_resumes_what_it_has(scene: Scene) -> None:
    wget = require("wget")
    package = scene.jobs.add(noise(SIZE))
    file = scene.folder / "p.tar.gz"
    file.write_bytes(package.content[: SIZE // 3])
    command = (wget, "-q", "-c", "-O", file.name, "--header", AUTHORIZATION, scene.address(package))
    scene.run(*command)
    assert sha256(file.read_bytes()) == sha256(package.content)
    # Of a complete file nothing is left; wget takes the 416 as done.
    scene.run(*command)
    assert sha256(file.read_bytes()) == sha256(package.content)


def test_aria2_downloads_over_sixteen_connections(scene: Scene) -> None:
    aria2 = require("aria2c")
    package = scene.jobs.add(noise(SIZE))
    options = ("-q", "-x16", "-s16", "-k1M", "--auto-file-renaming=false", "--header", AUTHORIZATION)
    scene.run(aria2, *options, "-o", "p.tar.gz", scene.address(package))
    assert sha256((scene.folder / "p.tar.gz").read_bytes()) == sha256(package.content)
    assert not (scene.folder / "p.tar.gz.aria2").exists()
    ranges = "SELECT count(*) > 0 FROM download_events WHERE http_status = 206"
    wait_for("an event of a range", lambda: query(scene.jobs.dsn, ranges) == [(True,)])


def make_link(scene: Scene, package: Package) -> str:
    """The query string of a new link to the package."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{scene.daemon.port}{package.url}-link", method="POST", headers=ANN
    )
    with urllib.request.urlopen(request) as response:
        url: str = json.load(response)["url"]
    return url.partition("?")[2]


@pytest.mark.parametrize("client", ["curl", "wget"])
def test_a_link_resumes_without_a_token_even_late(scene: Scene, client: str) -> None:
    program = require(client)
    package = scene.jobs.add(noise(SIZE))
    ticket = make_link(scene, package)
    proxy = CuttingProxy(scene.daemon.port, cuts=3, largest=SIZE // 4)
    file = scene.folder / "p.tar.gz"
    address = f"{scene.address(package, proxy.port)}?{ticket}"
    command, statuses = {
        "curl": ((program, "-sS", "-C", "-", "-o", file.name), (0, 18, 52, 56)),
        "wget": ((program, "-q", "-c", "-t", "1", "-O", file.name), (0, 4)),
    }[client]
    assert scene.run(*command, address, statuses=statuses).returncode != 0
    wait_for("the cut download's end", lambda: scene.daemon.events("download_aborted"))
    query(scene.jobs.dsn, "UPDATE exportd_download_links SET start_until = now() - interval '1 s'")
    while scene.run(*command, address, statuses=statuses).returncode != 0:
        assert proxy.connections <= 20
    proxy.close()
    assert sha256(file.read_bytes()) == sha256(package.content)
    assert ticket not in "".join(map(str, scene.daemon.log))


@pytest.mark.parametrize("client", ["curl", "wget"])
def test_a_download_that_is_cut_twenty_times_comes_whole(scene: Scene, client: str) -> None:
    program = require(client)
    package = scene.jobs.add(noise(SIZE))
    proxy = CuttingProxy(scene.daemon.port, cuts=20, largest=SIZE // 12)
    file = scene.folder / "p.tar.gz"
    address = scene.address(package, proxy.port)
    if client == "curl":
        command: tuple[str, ...] = (program, "-sS", "-C", "-", "-o", file.name, "-H", AUTHORIZATION, address)
        statuses: tuple[int, ...] = (0, 18, 52, 56)
    else:
        command = (program, "-q", "-c", "-t", "1", "-O", file.name, "--header", AUTHORIZATION, address)
        statuses = (0, 4)
    while scene.run(*command, statuses=statuses).returncode != 0:
        assert proxy.connections <= 20
    proxy.close()
    assert proxy.connections > 10
    assert sha256(file.read_bytes()) == sha256(package.content)


def test_the_daemon_is_restarted_between_two_parts(scene: Scene) -> None:
    curl = require("curl")
    package = scene.jobs.add(noise(SIZE))
    proxy = CuttingProxy(scene.daemon.port, cuts=1, largest=SIZE // 2)
    command = (curl, "-sS", "-C", "-", "-o", "p.tar.gz", "-D", "head", "-H", AUTHORIZATION)
    scene.run(*command, scene.address(package, proxy.port), statuses=(18, 56))
    proxy.close()
    tag = re.findall(rb"\r\nETag: (.*)\r\n", (scene.folder / "head").read_bytes())
    assert scene.daemon.stop() == 0
    scene.daemon = scene.serve()
    scene.run(*command, scene.address(package))
    assert sha256((scene.folder / "p.tar.gz").read_bytes()) == sha256(package.content)
    # The validator is the content's own, so a client that compares it sees the same package.
    assert re.findall(rb"\r\nETag: (.*)\r\n", (scene.folder / "head").read_bytes()) == tag


NAMES = [
    ("Customer Form", "export-customer-form-2025-10-24.tar.gz", "export-customer-form-2025-10-24.tar.gz"),
    ("../../etc/passwd", "export-etc-passwd-2025-10-24.tar.gz", "export-etc-passwd-2025-10-24.tar.gz"),
    (
        'a "b"; filename=x',
        "export-a-b-filename-x-2025-10-24.tar.gz",
        "export-a-b-filename-x-2025-10-24.tar.gz",
    ),
    ("Résumé", "export-resume-2025-10-24.tar.gz", "export-résumé-2025-10-24.tar.gz"),
    ("你好 🚀", "export-package-2025-10-24.tar.gz", "export-你好-🚀-2025-10-24.tar.gz"),
    ("x" * 300, f"export-{'x' * 150}-2025-10-24.tar.gz", f"export-{'x' * 150}-2025-10-24.tar.gz"),
]


def named(jobs: Jobs, tool_name: str) -> Package:
    package = jobs.add(noise(1000))
    query(
        jobs.dsn,
        "UPDATE export_jobs SET tool_data = jsonb_build_object('name', %s::text) WHERE job_id = %s",
        (tool_name, package.job_id),
    )
    return package


@pytest.mark.parametrize(("tool_name", "plain", "extended"), NAMES, ids=[name[0][:20] for name in NAMES])
def test_clients_save_under_the_right_name(
    exportd: Exportd, tmp_path: Path, tool_name: str, plain: str, extended: str
) -> None:
    scene = Scene(exportd, "sendfile", tmp_path / "d")
    scene.folder.mkdir()
    address = scene.address(named(scene.jobs, tool_name))
    # curl reads filename only, wget 1.21 and browsers filename* where there is one.
    saved = {}
    for client, command in {
        "curl": (require("curl"), "-sSf", "-OJ", "-H", AUTHORIZATION),
        "wget": (require("wget"), "-q", "--content-disposition", "--header", AUTHORIZATION),
    }.items():
        for old in scene.folder.iterdir():
            old.unlink()
        scene.run(*command, address)
        (file,) = scene.folder.iterdir()
        saved[client] = file.name
    assert saved["curl"] == plain
    assert saved["wget"] in (plain, extended)


@pytest.mark.slow
async def test_chromium_saves_under_the_right_names(exportd: Exportd, tmp_path: Path) -> None:
    from playwright.async_api import async_playwright

    chromium = require("chromium")
    scene = Scene(exportd, "sendfile", tmp_path)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = await browser.new_page(extra_http_headers=ANN)
        for tool_name, _, extended in NAMES:
            package = named(scene.jobs, tool_name)
            async with page.expect_download() as waiting:
                await page.evaluate("address => { location.href = address }", scene.address(package))
            download = await waiting.value
            assert download.suggested_filename == extended
            assert Path(await download.path()).read_bytes() == package.content
        await browser.close()


def sendfile_calls(trace: Path) -> list[int]:
    """What each sendfile call in an strace log returned."""
    return [int(sent) for sent in re.findall(r"sendfile\(.*\) = (\d+)", trace.read_text())]


def test_sendfile_is_what_sends(exportd: Exportd, tmp_path: Path) -> None:
    strace, curl = require("strace"), require("curl")
    exportd.storage.mkdir(parents=True)
    package = Jobs(exportd.dsn, exportd.storage).add(noise(SIZE))
    sent = {}
    for way in ("true", "false"):
        trace = tmp_path / f"trace-{way}"
        # -D: the tracer steps aside, so that our signals reach the daemon.
        command = (strace, "-D", "-f", "-qq", "-e", "trace=sendfile", "-o", trace)
        daemon = exportd.serve(under=command, EXPORTD_DOWNLOAD__SENDFILE=way)
        address = f"http://127.0.0.1:{daemon.port}{package.url}"
        subprocess.run([curl, "-sSf", "-o", "/dev/null", "-H", AUTHORIZATION, address], check=True)
        wait_for("the end of the download", lambda daemon=daemon: daemon.events("download_completed"))
        assert daemon.stop() == 0
        sent[way] = sendfile_calls(trace)
    assert sum(sent["true"]) == SIZE
    assert max(sent["true"]) <= 524288
    assert sent["false"] == []
