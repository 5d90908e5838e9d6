"""What ``/metrics`` says, by the text of each sample's name and labels."""

from typing import Any

from aiohttp.test_utils import TestClient


def samples_of(text: str) -> dict[str, float]:
    """``exportd_requests_total{route="download",status="200"}`` and its like, with their values."""
    pairs = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    samples = {name: float(value) for name, _, value in pairs}
    assert samples
    return samples


def types_of(text: str) -> dict[str, str]:
    """Each metric's type, by its name: a counter's with ``_total``."""
    lines = (line.split(" ") for line in text.splitlines() if line.startswith("# TYPE "))
    return {name: kind for _, _, name, kind in lines}


async def scrape(client: TestClient[Any, Any]) -> dict[str, float]:
    """The samples of an application in this process."""
    async with client.get("/metrics") as response:
        assert response.status == 200
        return samples_of(await response.text())
