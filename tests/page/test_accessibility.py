"""For everybody: axe-core's rules in each state, the keyboard alone, small screens, little motion."""

import re
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.page.conftest import Site, open_dialog, row, token
from tests.support.application import noise
from tests.support.postgres import query

pytestmark = pytest.mark.slow

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True}
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "phone": PHONE,
    "contrast": {"forced_colors": "active"},
}


def add_one_of_each(site: Site) -> None:
    def tool(name: str) -> dict[str, str]:
        return {"tool_data": f'{{"name": "{name}"}}'}

    none = {"package_path": None, "completed_at": None}
    soon = datetime.now().astimezone() + timedelta(days=1)
    site.jobs.add(noise(20_000_000))
    site.jobs.add(noise(10), **tool("Soon"), package_expires_at=soon)
    site.jobs.add(noise(10), **tool("Gone"), package_path=None)
    site.jobs.add(noise(10), **tool("Touched"), package_suspect_since="2026-01-01")
    site.jobs.add(b"", **tool("Waiting"), status="pending", **none)
    site.jobs.add(b"", **tool("Working"), status="processing", pack_percent=40, **none)
    site.jobs.add(
        b"", **tool("Broken " + "very-long-name" * 9), status="failed", failure_reason="x" * 300, **none
    )


def show_list(page: Page) -> None:
    expect(page.get_by_role("listitem")).to_have_count(7)


def show(tool: str, text: str) -> Callable[[Page], None]:
    def open_it(page: Page) -> None:
        expect(open_dialog(page, tool).get_by_text(text)).to_be_visible()

    return open_it


def show_commands(page: Page) -> None:
    open_dialog(page).get_by_text("By command line").click()
    expect(page.get_by_role("button", name="Copy the curl line")).to_be_visible()


def show_download(page: Page) -> None:
    dialog = open_dialog(page)
    dialog.get_by_role("button", name="Download in this page").click()
    expect(dialog.get_by_text(re.compile(r"\d+ % "))).to_be_visible()


def show_pause(page: Page) -> None:
    show_download(page)
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_text("Paused")).to_be_visible()


def show_failure(page: Page) -> None:
    page.route("**/download-link", lambda route: route.abort())
    open_dialog(page).get_by_role("button", name="Download package").click()
    expect(page.get_by_role("alert").filter(has_text="The connection is lost.")).to_be_visible()


def show_signed_out(page: Page) -> None:
    page.get_by_role("button", name="Sign out").click()


def show_empty(page: Page) -> None:
    page.once("dialog", lambda dialog: dialog.accept())
    page.evaluate("(token) => { location.hash = `token=${token}`; }", token("nobody"))
    expect(page.get_by_role("heading", name="No exports yet")).to_be_visible()


STATES = {
    "list": show_list,
    "ready": show("Customer Form", "Ready"),
    "commands": show_commands,
    "soon": show("Soon", "Expires in"),
    "gone": show("Gone", "deleted"),
    "touched": show("Touched", "changed after"),
    "working": show("Working", "being made"),
    "downloading": show_download,
    "paused": show_pause,
    "failure": show_failure,
    "signed out": show_signed_out,
    "empty": show_empty,
}


@pytest.mark.parametrize("look", LOOKS)
def test_axe_finds_nothing_in_any_state(site: Site, look: str) -> None:
    add_one_of_each(site)
    site.start(EXPORTD_DOWNLOAD__MAX_RATE_BYTES_PER_SECOND="4000000")
    axe = Axe()
    for name, bring_about in STATES.items():
        page = site.visit(**LOOKS[look])
        show_list(page)
        bring_about(page)
        found = axe.run(page)
        assert found.violations_count == 0, f"{name}: {found.generate_report()}"
        assert len(found.response["passes"]) > 10
        if look == "phone":
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} is too wide"
            heights = page.evaluate(
                "[...document.querySelectorAll('button, select, input')].filter((e) => e.checkVisibility())"
                ".map((e) => e.getBoundingClientRect().height)"
            )
            assert min(heights) >= 44, name
        page.close()


def test_the_keyboard_is_enough(site: Site) -> None:
    package = site.jobs.add(noise(1_000_000))
    site.jobs.add(noise(10), tool_data='{"name": "Other"}', created_at="2020-01-01")
    page = site.visit()
    expect(row(page, "Customer Form")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_label("Show")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Sign out")).to_be_focused()
    page.keyboard.press("Tab")
    opener = page.get_by_role("button", name="Download… Customer Form")
    expect(opener).to_be_focused()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Customer Form")
    expect(dialog).to_be_visible()
    expect(dialog.get_by_role("button", name="Close")).to_be_focused()
    expect(dialog.get_by_role("button", name="Download package")).to_be_visible()
    page.keyboard.press("Tab")
    expect(dialog.get_by_role("button", name="Download package")).to_be_focused()
    page.keyboard.press("Tab")
    expect(dialog.get_by_role("button", name="Download in this page")).to_be_focused()
    page.keyboard.press("Space")
    expect(dialog.get_by_text("Downloaded and checked: its SHA-256 is right.")).to_be_visible()
    # The focus is still in the dialog, and goes back to where it came from.
    assert page.evaluate("document.activeElement.localName") == "export-download"
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(opener).to_be_focused()
    assert site.jobs.counts(package)[0] == 1


def test_news_of_an_export_do_not_take_the_focus(site: Site) -> None:
    site.jobs.add(b"", status="pending", package_path=None, completed_at=None)
    page = site.visit()
    button = row(page, "Customer Form").get_by_role("button")
    button.focus()
    query(site.exportd.dsn, "UPDATE export_jobs SET status = 'processing', pack_percent = 7")
    expect(row(page, "Customer Form")).to_contain_text("7 %")
    expect(button).to_be_focused()


def test_reduced_motion_disables_animations(site: Site) -> None:
    add_one_of_each(site)
    page = site.visit(reduced_motion="reduce")
    dialog = open_dialog(page, "Waiting")
    expect(dialog.get_by_role("progressbar")).to_be_visible()
    assert page.evaluate("document.getAnimations().length") == 0
    assert dialog.get_by_role("progressbar").evaluate("bar => getComputedStyle(bar).animationName") == "none"


def test_success_and_failure_are_announced(site: Site) -> None:
    """Into live regions that were there before: one that comes with its text is not read out."""
    site.jobs.add(noise(1000))
    page = site.visit()
    dialog = open_dialog(page)
    regions = dialog.locator(".toasts > [role]")
    assert regions.evaluate_all("all => all.map((one) => [one.role, one.childElementCount])") == [
        ["status", 0],
        ["alert", 0],
    ]
    dialog.get_by_role("button", name="Download in this page").click()
    expect(regions.nth(0)).to_contain_text("Customer Form: downloaded and checked.")
    page.route("**/download-link", lambda route: route.abort())
    dialog.get_by_role("button", name="Download package").click()
    expect(regions.nth(1)).to_contain_text("Customer Form: The connection is lost.")
