"""The list of exports: what it shows, and the states it can be in."""

import re
import signal
import subprocess
import sys
import uuid
from datetime import datetime, timedelta

import pytest
from playwright.sync_api import Page, expect

from tests.page.conftest import Site, digest_of, open_dialog, row, token
from tests.support.application import noise
from tests.support.daemon import wait_for
from tests.support.postgres import query

pytestmark = pytest.mark.slow

UNDER_WAY = {"package_path": None, "completed_at": None, "package_size_bytes": None, "package_sha256": None}


def tool(name: str) -> dict[str, str]:
    return {"tool_data": f'{{"name": "{name}"}}'}


def headings(page: Page) -> list[str]:
    return page.get_by_role("listitem").get_by_role("heading").all_text_contents()


def test_the_list_tells_of_each_export(site: Site) -> None:
    now = datetime.now().astimezone()
    site.jobs.add(noise(3000), **tool("Old"), created_at="2025-01-01", package_expires_at="2025-02-01")
    site.jobs.add(b"", **tool("Gone"), created_at="2025-01-02", package_path=None)
    site.jobs.add(noise(3000), **tool("Touched"), created_at="2025-01-03", package_suspect_since="2025-01-04")
    failed = {**UNDER_WAY, "status": "failed", "failure_reason": "the source folder is not there"}
    site.jobs.add(b"", **tool("Broken"), created_at="2025-01-05", **failed)
    site.jobs.add(
        noise(3_000_000), **tool("<b>Form</b>"), created_at="2025-01-06", download_count=2,
        package_expires_at=now + timedelta(days=2, hours=3),
    )  # fmt: skip
    site.jobs.add(noise(10), **tool("Kept"), created_at="2025-01-07", package_expires_at=None)
    site.jobs.add(b"", **tool("Waiting"), created_at="2025-01-08", status="pending", **UNDER_WAY)
    site.jobs.add(b"", **tool("Somebody's"), user_id="eve")
    page = site.visit()
    expect(page.get_by_role("listitem")).to_have_count(7)
    assert headings(page) == ["Waiting", "Kept", "<b>Form</b>", "Broken", "Touched", "Gone", "Old"]
    form = row(page, "<b>Form</b>")
    for text in ("Ready", "2.9 MB", "twice", "Expires in 2 days, on ", "Jan 6, 2025"):
        expect(form).to_contain_text(text)
    expect(row(page, "Kept")).to_contain_text("Kept without end")
    expect(row(page, "Broken")).to_contain_text("the source folder is not there")
    expect(row(page, "Touched")).to_contain_text("Withheld")
    expect(row(page, "Old")).to_contain_text("Expired on Feb 1, 2025")
    expect(row(page, "Gone").get_by_role("button")).to_have_text("Details…")
    expect(form.get_by_role("button")).to_have_text("Download…")


def test_more_is_shown_on_demand_and_by_status(site: Site) -> None:
    for number in range(45):
        site.jobs.add(b"", **tool(f"Form {number}"), created_at=f"2025-01-01 00:{number:02}")
    site.jobs.add(b"", **tool("Bad"), created_at="2024-01-01", status="failed", **UNDER_WAY)
    page = site.visit()
    items = page.get_by_role("listitem")
    more = page.get_by_role("button", name="Show more")
    expect(items).to_have_count(20)
    more.click()
    expect(items).to_have_count(40)
    # Who goes by keyboard goes on with the first of the new ones.
    expect(items.nth(20).get_by_role("button")).to_be_focused()
    more.click()
    expect(items).to_have_count(46)
    expect(more).to_be_hidden()
    assert headings(page) == [f"Form {number}" for number in range(44, -1, -1)] + ["Bad"]
    page.get_by_label("Show").select_option("Failed")
    expect(items).to_have_count(1)
    assert headings(page) == ["Bad"]
    page.get_by_label("Show").select_option("Being made")
    expect(page.get_by_text("No export is in this state")).to_be_visible()


def test_an_export_is_watched_while_it_is_made(site: Site) -> None:
    package = site.jobs.add(noise(1000), **tool("New"), status="pending", **UNDER_WAY)
    page = site.visit()
    expect(row(page, "New")).to_contain_text("Waiting")
    query(site.exportd.dsn, "UPDATE export_jobs SET status = 'processing', pack_percent = 30")
    expect(row(page, "New")).to_contain_text("Being made: 30 %")
    expect(row(page, "New").get_by_role("progressbar", name="New: Being made")).to_have_attribute(
        "value", "0.3"
    )
    query(
        site.exportd.dsn,
        "UPDATE export_jobs SET status = 'completed', completed_at = now(), package_path = %s,"
        " package_size_bytes = 1000",
        (package.file.name,),
    )
    expect(row(page, "New").get_by_role("button")).to_have_text("Download…")


def test_nothing_yet_is_said_in_words(site: Site) -> None:
    page = site.visit()
    expect(page.get_by_role("heading", name="No exports yet")).to_be_visible()


def test_loading_is_seen(site: Site) -> None:
    site.jobs.add(noise(10))
    site.start()
    page = site.visit(f"{site.origin}/")
    page.route("**/export-jobs?*", lambda route: None)
    page.goto(f"{site.origin}/#token={token('ann')}")
    expect(page.locator("#exports")).to_have_attribute("aria-busy", "true")
    expect(page.locator(".skeleton")).to_have_count(3)


@pytest.mark.fresh_database
def test_a_service_that_is_away_is_told_and_comes_back(site: Site) -> None:
    site.jobs.add(noise(10))
    daemon = site.start()
    port = daemon.port
    page = site.visit()
    expect(row(page, "Customer Form")).to_be_visible()
    daemon.stop(signal.SIGKILL)
    page.get_by_label("Show").select_option("Completed")
    expect(page.get_by_role("heading", name="The service cannot be reached")).to_be_visible()
    site.start("--port", port)
    page.get_by_role("button", name="Try again").click()
    expect(row(page, "Customer Form")).to_be_visible()


def test_an_offline_page_keeps_the_list(site: Site) -> None:
    site.jobs.add(noise(10), **tool("New"), status="pending", **UNDER_WAY)
    page = site.visit()
    expect(row(page, "New")).to_contain_text("Waiting")
    page.context.set_offline(True)
    expect(
        page.get_by_text("You are offline. What you see may be out of date. Trying again…")
    ).to_be_visible()
    expect(row(page, "New")).to_be_visible()
    query(site.exportd.dsn, "UPDATE export_jobs SET status = 'processing', pack_percent = 5")
    page.context.set_offline(False)
    expect(row(page, "New")).to_contain_text("Being made: 5 %")
    expect(page.get_by_text("You are offline.")).to_be_hidden()


def test_an_admin_sees_everybodys(site: Site) -> None:
    site.jobs.add(noise(10))
    site.jobs.add(noise(10), **tool("Eve's"), user_id="eve")
    site.start()
    page = site.visit(f"{site.origin}/#token={token('root', 'admin')}")
    expect(page.get_by_role("listitem")).to_have_count(2)
    expect(row(page, "Eve's")).to_contain_text("Byeve")


def test_a_link_to_one_export_opens_it(site: Site) -> None:
    package = site.jobs.add(noise(10), created_at="2020-01-01")
    for number in range(21):
        site.jobs.add(b"", **tool(f"Form {number}"))
    site.start()
    page = site.visit(f"{site.origin}/#token={token('ann')}&job={package.job_id}")
    expect(page.get_by_role("dialog", name="Customer Form")).to_be_visible()
    assert page.url == f"{site.origin}/#job={package.job_id}"
    page.goto(f"{site.origin}/#job={uuid.uuid4()}")
    expect(page.get_by_text("There is no such export. It may have been removed.")).to_be_visible()


@pytest.mark.fresh_database
def test_the_dialog_is_there_from_waiting_to_downloaded(site: Site) -> None:
    """The real thing: the packer makes it, the browser saves it."""
    exports = site.exportd.folder / "exports"
    exports.mkdir()
    (exports / "data.bin").write_bytes(noise(20_000_000))
    job_id = str(uuid.uuid4())
    query(
        site.exportd.dsn,
        "INSERT INTO export_jobs (job_id, user_id, status, tool_data, pack_source)"
        " VALUES (%s, 'ann', 'pending', '{\"name\": \"Form\"}', %s)",
        (job_id, str(exports)),
    )
    page = site.visit()
    dialog = open_dialog(page, "Form")
    expect(dialog.get_by_text("Waiting to be made")).to_be_visible()
    expect(dialog.get_by_role("progressbar", name="Waiting to be made")).to_be_visible()
    expect(dialog.get_by_role("button", name="Download package")).to_be_hidden()
    packer = {"EXPORTD_PACKER__SOURCE_ROOTS": f'["{exports}"]', "EXPORTD_PACKER__ENABLED": "true"}
    site.exportd.serve(**packer)
    expect(dialog.get_by_text("Ready: ")).to_be_visible()
    with page.expect_download() as waiting:
        dialog.get_by_role("button", name="Download package").click()
    ((digest, size),) = query(site.exportd.dsn, "SELECT package_sha256, package_size_bytes FROM export_jobs")
    assert digest_of(waiting.value.path()) == digest
    assert waiting.value.path().stat().st_size == size
    expect(dialog.get_by_text("Downloaded.", exact=True)).to_be_visible()


@pytest.mark.fresh_database
def test_the_demos_address_shows_what_can_be_tried(site: Site) -> None:
    output = site.exportd.folder / "demo.log"
    command = [sys.executable, "-m", "exportd", "demo"]
    with output.open("w") as stdout:
        demo = subprocess.Popen(command, env=site.exportd.environ, cwd=site.exportd.folder, stdout=stdout)
    try:
        found = wait_for("the address", lambda: re.search(r"(http://\S+)/#token=\S+", output.read_text()))
        site.origin = found[1]
        page = site.visit(found[0])
        expect(row(page, "Sample Export")).to_contain_text("Ready")
        expect(row(page, "Packed By The Daemon").get_by_role("button")).to_have_text("Download…")
    finally:
        demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 0
