"""Downloads from the page: by the browser, and in the page."""

from playwright.sync_api import expect

from tests.page.conftest import Site, digest_of, open_dialog, row, saved_digest
from tests.support.application import noise

NAME = "export-customer-form-2025-10-24.tar.gz"


def test_the_browser_downloads_and_the_server_tells_of_it(site: Site) -> None:
    package = site.jobs.add(noise(30_000_000))
    site.start(EXPORTD_DOWNLOAD__MAX_RATE_BYTES_PER_SECOND="12000000")
    page = site.visit()
    dialog = open_dialog(page)
    with page.expect_download() as waiting:
        dialog.get_by_role("button", name="Download package").click()
    expect(dialog.get_by_text("Your browser is downloading")).to_be_visible()
    expect(dialog.get_by_text("of 28.6 MB")).to_be_visible()
    download = waiting.value
    assert download.suggested_filename == NAME
    assert digest_of(download.path()) == digest_of(package.content)
    expect(dialog.get_by_text("Customer Form: downloaded.")).to_be_visible()
    expect(dialog.get_by_text("Downloaded.", exact=True)).to_be_visible()
    page.keyboard.press("Escape")
    expect(row(page, "Customer Form")).to_contain_text("Downloadedonce")
    assert site.jobs.counts(package)[0] == 1


def test_the_page_downloads_and_checks(site: Site) -> None:
    package = site.jobs.add(noise(3_000_000))
    page = site.visit()
    dialog = open_dialog(page)
    dialog.get_by_role("button", name="Download in this page").click()
    expect(dialog.get_by_text("Downloaded and checked: its SHA-256 is right.")).to_be_visible()
    assert saved_digest(page, NAME) == digest_of(package.content)
    assert site.jobs.counts(package)[0] == 1
