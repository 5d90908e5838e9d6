"""Each error in words that a person understands, announced, and the way on."""

import uuid
from datetime import datetime, timedelta

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.page.conftest import Site, open_dialog, row, token
from tests.support.application import noise
from tests.support.postgres import query

pytestmark = pytest.mark.slow

BUTTON = "Download package"


def show(site: Site, job_id: str, user: str = "ann") -> tuple[Page, Locator]:
    """The dialog of one export, by its address."""
    page = site.visit(f"{site.origin}/#token={token(user)}&job={job_id}")
    dialog = page.get_by_role("dialog")
    return page, dialog


def expect_toast(page: Page, text: str) -> None:
    """Said at once by assistive technology, and there until it is dismissed."""
    toast = page.get_by_role("alert").filter(has_text=text)
    expect(toast).to_be_visible()
    toast.get_by_role("button", name="Dismiss").click()
    expect(toast.locator(".toast")).to_have_count(0)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("eve's", "Only the person who made this export, or an administrator, may download it."),
        ("nobody's", "There is no such export. It may have been removed."),
        ("nonsense", "There is no such export: its number is not valid."),
    ],
)
def test_another_users_job_shows_an_error(site: Site, address: str, said: str) -> None:
    eves = site.jobs.add(noise(10), user_id="eve")
    site.start()
    job_id = {"eve's": eves.job_id, "nobody's": str(uuid.uuid4())}.get(address, address)
    page, _ = show(site, job_id)
    expect_toast(page, said)


def test_a_package_that_has_expired_cannot_be_downloaded_and_can_be_made_again(site: Site) -> None:
    expired = datetime.now().astimezone() - timedelta(hours=1)
    package = site.jobs.add(noise(10), package_expires_at=expired, created_at="2026-01-01")
    page = site.visit()
    dialog = open_dialog(page)
    expect(dialog.get_by_text("The package expired on")).to_be_visible()
    expect(dialog.get_by_role("button", name=BUTTON)).to_be_disabled()
    dialog.get_by_role("button", name="Export again").click()
    expect(dialog.get_by_text("Waiting to be made")).to_be_visible()
    expect(page.get_by_text("It is being exported again.")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("listitem")).to_have_count(2)
    ((new_id,),) = query(site.exportd.dsn, "SELECT job_id FROM export_jobs WHERE re_export_of IS NOT NULL")
    # The old one leads to the new one.
    page.get_by_role("listitem").nth(1).get_by_role("button").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name="Show the newer export").click()
    expect(dialog.get_by_text("Waiting to be made")).to_be_visible()
    expect(dialog.locator("export-download")).to_have_attribute("job-id", str(new_id))
    assert package.job_id != str(new_id)


def test_a_package_that_expires_meanwhile_is_told_with_its_date(site: Site) -> None:
    site.jobs.add(noise(10))
    page = site.visit()
    dialog = open_dialog(page)
    expect(dialog.get_by_role("button", name=BUTTON)).to_be_enabled()
    query(site.exportd.dsn, "UPDATE export_jobs SET package_expires_at = now() - interval '1 minute'")
    dialog.get_by_role("button", name=BUTTON).click()
    expect_toast(page, "The package expired on")
    expect(dialog.get_by_role("button", name=BUTTON)).to_be_disabled()
    expect(dialog.get_by_role("button", name="Export again")).to_be_visible()


def test_an_export_that_failed_says_why_and_can_be_tried_again(site: Site) -> None:
    site.jobs.add(b"", status="failed", package_path=None, failure_reason="the disk was full")
    page = site.visit()
    dialog = open_dialog(page)
    expect(dialog.get_by_text("The export failed: the disk was full.")).to_be_visible()
    dialog.get_by_role("button", name="Export again").click()
    expect(dialog.get_by_text("Waiting to be made")).to_be_visible()


@pytest.mark.fresh_database
def test_the_page_says_that_an_export_cannot_be_repeated(site: Site) -> None:
    site.jobs.add(b"", status="failed", package_path=None)
    query(site.exportd.dsn, "ALTER TABLE export_jobs ADD COLUMN owned_by text NOT NULL DEFAULT 'app'")
    query(site.exportd.dsn, "ALTER TABLE export_jobs ALTER COLUMN owned_by DROP DEFAULT")
    page = site.visit()
    open_dialog(page).get_by_role("button", name="Export again").click()
    expect_toast(page, "Exports cannot be repeated from here. Start a new one in your application.")


@pytest.mark.parametrize("by", [BUTTON, "Download in this page"])
def test_a_missing_file_is_told(site: Site, by: str) -> None:
    package = site.jobs.add(noise(10))
    package.file.unlink()
    page = site.visit()
    open_dialog(page).get_by_role("button", name=by).click()
    expect_toast(page, "The package is missing on the server.")


def test_a_file_that_cannot_be_read_is_told(site: Site) -> None:
    package = site.jobs.add(noise(10))
    package.file.write_bytes(b"another size")
    page = site.visit()
    open_dialog(page).get_by_role("button", name=BUTTON).click()
    expect_toast(page, "The server cannot read the package. Contact the operator of this service.")


def test_a_package_that_was_touched_is_withheld(site: Site) -> None:
    site.jobs.add(noise(10), package_suspect_since="2026-01-01")
    page = site.visit()
    dialog = open_dialog(page)
    expect(dialog.get_by_text("The package changed after it was made")).to_be_visible()
    expect(dialog.get_by_role("button", name=BUTTON)).to_be_disabled()


def test_too_many_downloads_at_once_are_told_with_when_to_try_again(site: Site) -> None:
    site.jobs.add(noise(30_000_000), tool_data='{"name": "Large"}')
    site.jobs.add(noise(10), tool_data='{"name": "Small"}')
    site.start(EXPORTD_LIMITS__DOWNLOADS_PER_USER="1", EXPORTD_DOWNLOAD__MAX_RATE_BYTES_PER_SECOND="2000000")
    page = site.visit()
    dialog = open_dialog(page, "Large")
    dialog.get_by_role("button", name="Download in this page").click()
    expect(dialog.get_by_role("button", name="Pause")).to_be_visible()
    page.keyboard.press("Escape")
    dialog = open_dialog(page, "Small")
    dialog.get_by_role("button", name=BUTTON).click()
    expect_toast(page, "Too many downloads run at once. Try again when one has ended, in 10 s.")


def test_a_quota_that_is_used_up_is_told_with_when_there_is_more(site: Site) -> None:
    package = site.jobs.add(noise(1000))
    site.start(EXPORTD_LIMITS__BYTES_PER_USER_PER_DAY="1000")
    page = site.visit()
    dialog = open_dialog(page)
    dialog.get_by_role("button", name="Download in this page").click()
    expect(dialog.get_by_text("Downloaded and checked: its SHA-256 is right.")).to_be_visible()
    dialog.get_by_role("button", name=BUTTON).click()
    expect_toast(page, "You have downloaded as much as is allowed in a day. More is possible from")
    assert site.jobs.counts(package)[0] == 1


def test_too_many_requests_are_waited_for_in_the_page(site: Site) -> None:
    site.jobs.add(noise(1000))
    # The page itself needs some fifteen.
    site.start(EXPORTD_LIMITS__REQUESTS_PER_MINUTE_PER_USER="3")
    page = site.visit()
    dialog = open_dialog(page)
    expect(dialog.get_by_text("Ready")).to_be_visible()
    dialog.get_by_role("button", name=BUTTON).click()
    expect(dialog.get_by_text("Too many requests. Try again in").first).to_be_visible()


def test_a_token_that_ends_amid_it_signs_out(site: Site) -> None:
    site.jobs.add(noise(1000))
    page = site.visit()
    dialog = open_dialog(page)
    expect(dialog.get_by_role("button", name=BUTTON)).to_be_enabled()
    page.route("**/download-link", lambda route: route.continue_(headers={"authorization": "Bearer gone"}))
    dialog.get_by_role("button", name=BUTTON).click()
    expect(page.get_by_role("heading", name="You are signed out")).to_be_visible()
    expect(page.get_by_text("You were signed out: the token is over.")).to_be_visible()


def test_a_dead_link_is_a_page_in_words(site: Site) -> None:
    package = site.jobs.add(noise(1000))
    page = site.visit()
    expect(row(page, "Customer Form")).to_be_visible()
    page.goto(f"{site.origin}{package.url}?ticket=gone")
    expect(page.get_by_role("main")).to_contain_text("This download link is invalid, expired or revoked")


@pytest.mark.fresh_database
def test_an_unknown_error_shows_the_request_id(site: Site) -> None:
    site.jobs.add(noise(1000))
    page = site.visit()
    dialog = open_dialog(page)
    expect(dialog.get_by_role("button", name=BUTTON)).to_be_enabled()
    # What PostgreSQL does not know is a defect, to the daemon.
    query(site.exportd.dsn, "ALTER TABLE exportd_download_links RENAME TO elsewhere")
    dialog.get_by_role("button", name=BUTTON).click()
    expect_toast(page, "Internal server error. (request ")
