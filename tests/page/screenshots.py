"""Makes docs/images/page-*.png, the pictures of the README: `make screenshots`."""

import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect

from tests.page.conftest import Site, open_dialog, row
from tests.support.application import noise

IMAGES = Path(__file__).parent.parent.parent / "docs" / "images"
DESKTOP: dict[str, Any] = {"viewport": {"width": 900, "height": 640}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 760}, "device_scale_factor": 1.5}
SLOW = {"EXPORTD_DOWNLOAD__MAX_RATE_BYTES_PER_SECOND": "6000000"}


def add_exports(site: Site) -> None:
    now = datetime.now().astimezone()

    def add(tool: str, days_ago: float, size: int = 0, **columns: object) -> None:
        made = now - timedelta(days=days_ago)
        site.jobs.add(
            noise(size),
            **{
                "tool_data": f'{{"name": "{tool}"}}', "created_at": made, "completed_at": made,
                "package_expires_at": made + timedelta(days=30), **columns,
            },
        )  # fmt: skip

    none: dict[str, Any] = {"completed_at": None, "package_path": None, "package_size_bytes": None}
    add("Photo archive", 0, status="processing", pack_percent=42, **none)
    add("Customer form", 0.1, 31_000_000)
    add("Site survey", 28, 4_100_000, download_count=1)
    add("Résumé builder", 40, 900_000, package_path=None, download_count=3)
    add("Quarterly report", 41, status="failed", failure_reason="the source folder is not there", **none)


def picture(page: Page, name: str) -> None:
    page.screenshot(path=IMAGES / f"page-{name}.png", animations="disabled")


def test_the_list(site: Site) -> None:
    add_exports(site)
    looks: dict[str, dict[str, Any]] = {"light": {}, "dark": {"color_scheme": "dark"}}
    for name, options in looks.items():
        page = site.visit(**DESKTOP, **options)
        expect(row(page, "Quarterly report")).to_be_visible()
        picture(page, name)


def test_downloading(site: Site) -> None:
    add_exports(site)
    site.start(**SLOW)
    page = site.visit(**DESKTOP)
    dialog = open_dialog(page, "Customer form")
    dialog.get_by_role("button", name="Download in this page").click()
    expect(dialog.get_by_text(re.compile(r"[3-6]\d %"))).to_be_visible()
    picture(page, "downloading")


def test_expired(site: Site) -> None:
    add_exports(site)
    page = site.visit(**DESKTOP, color_scheme="dark")
    expect(open_dialog(page, "Résumé builder").get_by_text("was deleted")).to_be_visible()
    picture(page, "expired")


def test_phone(site: Site) -> None:
    add_exports(site)
    page = site.visit(**PHONE)
    expect(row(page, "Quarterly report")).to_be_visible()
    picture(page, "phone")
    expect(open_dialog(page, "Site survey").get_by_text("Ready")).to_be_visible()
    picture(page, "phone-dialog")
