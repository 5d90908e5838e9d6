"""Downloads from the page: by the browser, and in the page."""

import re
import signal
import subprocess
from pathlib import Path

import pytest
from playwright.sync_api import Dialog, Locator, Page, expect

from tests.page.conftest import Site, digest_of, open_dialog, row, saved_digest, token
from tests.support.application import Package, noise
from tests.support.daemon import wait_for
from tests.support.postgres import query
from tests.support.programs import require
from tests.support.proxy import CuttingProxy

pytestmark = pytest.mark.slow

# With its own download manager.
WHOLE_CHROMIUM = True
NAME = "export-customer-form-2025-10-24.tar.gz"
SIZE = 30_000_000
# Seconds for a whole package, so that there is something to be seen of it.
SLOW = {"EXPORTD_DOWNLOAD__MAX_RATE_BYTES_PER_SECOND": "8000000"}
CHECKED = "Downloaded and checked: its SHA-256 is right."


def begin_in_page(page: Page) -> Locator:
    dialog = open_dialog(page)
    dialog.get_by_role("button", name="Download in this page").click()
    return dialog


def percent(dialog: Locator) -> int:
    text = dialog.get_by_text(re.compile(r"\d+ %")).text_content() or ""
    return int(text.split(" %")[0])


def ranges_asked(page: Page) -> list[tuple[str | None, str | None]]:
    """Range and If-Range of each request for the package from here on; the list grows."""
    asked: list[tuple[str | None, str | None]] = []

    def note(request: object) -> None:
        if request.url.endswith("/download") and request.method == "GET":
            headers = request.headers
            asked.append((headers.get("range"), headers.get("if-range")))

    page.on("request", note)
    return asked


def test_the_browser_downloads_and_the_server_tells_of_it(site: Site) -> None:
    package = site.jobs.add(noise(SIZE))
    site.start(**SLOW)
    page = site.visit()
    dialog = open_dialog(page)
    with page.expect_download() as waiting:
        dialog.get_by_role("button", name="Download package").click()
    expect(dialog.get_by_text("Your browser is downloading")).to_be_visible()
    expect(dialog.get_by_text(re.compile(r"\d+ % · .* of 28.6 MB · .*/s · .* left"))).to_be_visible()
    assert 0 < percent(dialog) < 100
    download = waiting.value
    assert download.suggested_filename == NAME
    assert digest_of(download.path()) == digest_of(package.content)
    expect(dialog.get_by_text("Customer Form: downloaded.")).to_be_visible()
    expect(dialog.get_by_text("Downloaded.", exact=True)).to_be_visible()
    page.keyboard.press("Escape")
    expect(row(page, "Customer Form")).to_contain_text("Downloadedonce")
    assert site.jobs.counts(package)[0] == 1
    # The page stayed where it was, and no link is in its address or in the log.
    assert page.url == f"{site.origin}/"
    assert site.daemon is not None
    assert "ticket" not in site.daemon.output.read_text()


def test_a_browsers_download_that_stops_is_told_and_goes_on(site: Site) -> None:
    package = site.jobs.add(noise(SIZE))
    site.start(**SLOW)
    page = site.visit()
    dialog = open_dialog(page)
    with page.expect_download() as waiting:
        dialog.get_by_role("button", name="Download package").click()
    expect(dialog.get_by_text("Your browser is downloading")).to_be_visible()
    waiting.value.cancel()
    expect(dialog.get_by_text("The download stopped.")).to_be_visible()
    expect(dialog.get_by_text("Resume it among your browser's downloads")).to_be_visible()
    assert site.jobs.counts(package)[0] == 0
    with page.expect_download() as waiting:
        dialog.get_by_role("button", name="Download package").click()
    assert digest_of(waiting.value.path()) == digest_of(package.content)
    expect(dialog.get_by_text("Downloaded.", exact=True)).to_be_visible()


def test_a_browser_that_does_not_begin_is_helped(site: Site) -> None:
    site.jobs.add(noise(1000))
    page = site.visit()
    page.clock.install()
    dialog = open_dialog(page)
    # The browser forbids it, as it may where a page downloads again and again.
    page.evaluate("() => { HTMLAnchorElement.prototype.click = () => {}; }")
    dialog.get_by_role("button", name="Download package").click()
    expect(dialog.get_by_text("Your browser begins to download…")).to_be_visible()
    page.clock.run_for(16_000)
    expect(dialog.get_by_text("Your browser has not begun to download.")).to_be_visible()
    address = dialog.get_by_role("link", name="Open the link").get_attribute("href") or ""
    assert re.fullmatch(rf"{site.origin}/.*/download\?ticket=[\w-]{{43}}", address)


def test_the_page_downloads_and_checks(site: Site) -> None:
    package = site.jobs.add(noise(SIZE))
    site.start(**SLOW)
    page = site.visit()
    dialog = begin_in_page(page)
    expect(dialog.get_by_text(re.compile(r"\d+ % · .* of 28.6 MB · .*/s · .* left"))).to_be_visible()
    expect(dialog.get_by_text(CHECKED)).to_be_visible()
    assert saved_digest(page, NAME) == digest_of(package.content)
    assert site.jobs.counts(package)[0] == 1


def test_a_package_that_is_empty_is_downloaded(site: Site) -> None:
    site.jobs.add(b"")
    page = site.visit()
    expect(begin_in_page(page).get_by_text(CHECKED)).to_be_visible()
    assert saved_digest(page, NAME) == digest_of(b"")


def test_a_package_without_a_digest_is_not_called_checked(site: Site) -> None:
    site.jobs.add(noise(1000), package_sha256=None)
    page = site.visit()
    expect(begin_in_page(page).get_by_text("Downloaded.", exact=True)).to_be_visible()
    assert saved_digest(page, NAME) == digest_of(noise(1000))


def test_a_download_in_the_page_pauses_and_resumes(site: Site) -> None:
    package = site.jobs.add(noise(SIZE))
    site.start(**SLOW)
    page = site.visit()
    asked = ranges_asked(page)
    dialog = begin_in_page(page)
    expect(dialog.get_by_text(re.compile(r"[1-9]\d? % "))).to_be_visible()
    dialog.get_by_role("button", name="Pause").click()
    expect(dialog.get_by_text("Paused")).to_be_visible()
    kept = percent(dialog)
    assert 0 < kept < 100
    # Who pauses by keyboard goes on from the button that took its place.
    expect(dialog.get_by_role("button", name="Resume")).to_be_focused()
    wait_for("the end of the first part", lambda: site.daemon and site.daemon.events("download_aborted"))
    dialog.get_by_role("button", name="Resume").click()
    expect(dialog.get_by_text(CHECKED)).to_be_visible()
    assert saved_digest(page, NAME) == digest_of(package.content)
    first, second = asked
    assert first == (None, None)
    assert re.fullmatch(r"bytes=[1-9]\d+-", second[0] or "")
    assert second[1] == f'"{digest_of(package.content)}"'
    assert site.jobs.counts(package)[0] == 1


def test_a_download_goes_on_without_its_dialog(site: Site) -> None:
    package = site.jobs.add(noise(SIZE))
    site.start(**SLOW)
    page = site.visit()
    dialog = begin_in_page(page)
    expect(dialog.get_by_text(re.compile(r"\d+ % "))).to_be_visible()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    dialog = open_dialog(page)
    expect(dialog.get_by_role("button", name="Pause")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_text("Customer Form: downloaded and checked.")).to_be_visible()
    assert saved_digest(page, NAME) == digest_of(package.content)


def pause_and_reload(site: Site, page: Page) -> Locator:
    dialog = begin_in_page(page)
    expect(dialog.get_by_text(re.compile(r"[1-9]\d? % "))).to_be_visible()
    dialog.get_by_role("button", name="Pause").click()
    expect(dialog.get_by_text("Paused")).to_be_visible()
    page.reload()
    dialog = open_dialog(page)
    expect(dialog.get_by_text("Paused")).to_be_visible()
    return dialog


def test_a_download_in_the_page_goes_on_after_a_reload(site: Site) -> None:
    package = site.jobs.add(noise(SIZE))
    site.start(**SLOW)
    page = site.visit()
    dialog = pause_and_reload(site, page)
    assert percent(dialog) > 0
    asked = ranges_asked(page)
    dialog.get_by_role("button", name="Resume").click()
    expect(dialog.get_by_text(CHECKED)).to_be_visible()
    assert saved_digest(page, NAME) == digest_of(package.content)
    ((wanted, validator),) = asked
    assert re.fullmatch(r"bytes=[1-9]\d+-", wanted or "")
    assert validator == f'"{digest_of(package.content)}"'
    assert site.jobs.counts(package)[0] == 1
    # Nothing is left to resume.
    page.reload()
    expect(open_dialog(page).get_by_role("button", name="Download in this page")).to_be_visible()


def test_leaving_the_page_amid_a_download_is_asked_about_and_costs_nothing_kept(site: Site) -> None:
    package = site.jobs.add(noise(SIZE))
    site.start(**SLOW)
    page = site.visit()
    dialog = begin_in_page(page)
    expect(dialog.get_by_text(re.compile(r"\d+ % "))).to_be_visible()
    asked = []

    def accept(question: Dialog) -> None:
        asked.append(question.type)
        question.accept()

    page.once("dialog", accept)
    page.reload()
    assert asked == ["beforeunload"]
    dialog = open_dialog(page)
    dialog.get_by_role("button", name="Resume").click()
    expect(dialog.get_by_text(CHECKED)).to_be_visible()
    assert saved_digest(page, NAME) == digest_of(package.content)


def test_another_package_in_its_place_starts_anew(site: Site) -> None:
    package = site.jobs.add(noise(SIZE))
    site.start(**SLOW)
    page = site.visit()
    dialog = pause_and_reload(site, page)
    other = noise(SIZE + 1)
    replace(site, package, other)
    dialog.get_by_role("button", name="Resume").click()
    expect(dialog.get_by_text(CHECKED)).to_be_visible()
    assert saved_digest(page, NAME) == digest_of(other)


def replace(site: Site, package: Package, content: bytes) -> None:
    package.file.unlink()
    package.file.write_bytes(content)
    query(
        site.exportd.dsn,
        "UPDATE export_jobs SET package_sha256 = %s, package_size_bytes = %s",
        (digest_of(content), len(content)),
    )


def test_a_file_that_is_not_the_package_is_removed(site: Site) -> None:
    package = site.jobs.add(noise(100_000))
    package.file.write_bytes(noise(100_001)[1:])
    page = site.visit()
    dialog = begin_in_page(page)
    said = "What was saved is not what the server has: the SHA-256 differs. Start again."
    expect(dialog.get_by_text(said, exact=True)).to_be_visible()
    assert saved_digest(page, NAME) is None
    # And it can be: the right one is there now.
    package.file.write_bytes(package.content)
    query(site.exportd.dsn, "UPDATE export_jobs SET package_suspect_since = NULL")
    dialog.get_by_role("button", name="Download in this page").click()
    expect(dialog.get_by_text(CHECKED)).to_be_visible()
    assert saved_digest(page, NAME) == digest_of(package.content)


def test_a_lost_connection_is_waited_for(site: Site) -> None:
    package = site.jobs.add(noise(SIZE))
    site.start(**SLOW)
    proxy = CuttingProxy(int(site.origin.rpartition(":")[2]), cuts=0, largest=0)
    page = site.visit(f"http://127.0.0.1:{proxy.port}/#token={token('ann')}")
    dialog = begin_in_page(page)
    expect(dialog.get_by_text(re.compile(r"[1-9]\d? % "))).to_be_visible()
    proxy.cut()
    expect(dialog.get_by_text("The connection is lost. Trying again…")).to_be_visible()
    expect(dialog.get_by_text(CHECKED)).to_be_visible()
    proxy.close()
    assert saved_digest(page, NAME) == digest_of(package.content)
    assert site.jobs.counts(package)[0] == 1


@pytest.mark.fresh_database
def test_a_daemon_that_restarts_is_waited_for(site: Site) -> None:
    package = site.jobs.add(noise(SIZE))
    daemon = site.start(**SLOW)
    page = site.visit()
    dialog = begin_in_page(page)
    expect(dialog.get_by_text(re.compile(r"[1-9]\d? % "))).to_be_visible()
    port = daemon.port
    daemon.stop(signal.SIGKILL)
    expect(dialog.get_by_text("The connection is lost. Trying again…")).to_be_visible()
    site.start("--port", port, **SLOW)
    expect(dialog.get_by_text(CHECKED)).to_be_visible()
    assert saved_digest(page, NAME) == digest_of(package.content)


def test_cancelling_removes_the_file(site: Site) -> None:
    site.jobs.add(noise(SIZE))
    site.start(**SLOW)
    page = site.visit()
    dialog = begin_in_page(page)
    expect(dialog.get_by_text(re.compile(r"\d+ % "))).to_be_visible()
    dialog.get_by_role("button", name="Cancel").click()
    expect(dialog.get_by_role("button", name="Download package")).to_be_focused()
    assert saved_digest(page, NAME) is None
    page.reload()
    expect(open_dialog(page).get_by_role("button", name="Download in this page")).to_be_visible()


def test_choosing_no_file_changes_nothing(site: Site) -> None:
    site.jobs.add(noise(1000))
    page = site.visit()
    page.evaluate(
        "() => { window.showSaveFilePicker = async () => { throw new DOMException('No', 'AbortError'); } }"
    )
    dialog = begin_in_page(page)
    expect(dialog.get_by_text("Ready: 1000 B")).to_be_visible()
    expect(page.get_by_role("alert").locator(".toast")).to_have_count(0)


def test_a_disk_that_is_full_is_told(site: Site) -> None:
    site.jobs.add(noise(100_000))
    page = site.visit()
    page.evaluate(
        """() => {
             FileSystemWritableFileStream.prototype.write = async () => {
               throw new DOMException("Full", "QuotaExceededError");
             };
           }"""
    )
    dialog = begin_in_page(page)
    expect(dialog.get_by_text("The file cannot be written.").first).to_be_visible()
    expect(dialog.get_by_role("button", name="Resume")).to_be_visible()


def test_without_the_api_only_the_browser_downloads(site: Site) -> None:
    site.jobs.add(noise(1000))
    page = site.visit()
    page.evaluate("delete window.showSaveFilePicker")
    dialog = open_dialog(page)
    expect(dialog.get_by_role("button", name="Download package")).to_be_visible()
    expect(dialog.get_by_role("button", name="Download in this page")).to_be_hidden()


def test_command_lines_are_there_to_copy_and_they_work(site: Site, tmp_path: Path) -> None:
    curl = require("curl")
    package = site.jobs.add(noise(100_000))
    page = site.visit(permissions=["clipboard-read", "clipboard-write"])
    dialog = open_dialog(page)
    dialog.get_by_text("By command line").click()
    lines = []
    for name in ("curl", "sha256sum"):
        dialog.get_by_role("button", name=f"Copy the {name} line").click()
        expect(dialog.get_by_role("button", name=f"Copy the {name} line")).to_have_text("Copied")
        lines.append(page.evaluate("navigator.clipboard.readText()"))
    (tmp_path / NAME).write_bytes(package.content[:40_000])
    for line in lines:
        done = subprocess.run(
            line.replace("curl", curl, 1) if line.startswith("curl") else line,
            shell=True, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert (tmp_path / NAME).read_bytes() == package.content
    assert done.stdout == f"{NAME}: OK\n"
