"""What a log line shows, and what it must not."""

import json
import subprocess
import sys

import pytest

# structlog's and logging's configuration are the process's: so in one of its own.
_PROGRAM = """
import sys
import structlog
from exportd.telemetry.logging import configure_logging, stop_logging

def fail(token):
    raise ValueError("no good")

configure_logging("info", sys.argv[1], sys.stderr)
try:
    fail("".join(("sec", "ret")))
except ValueError:
    structlog.get_logger().exception("it_failed", job_id="j-1")
stop_logging()
"""


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_traceback_shows_no_local_variables(form: str) -> None:
    """They hold tokens."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, form], capture_output=True, text=True, check=True, timeout=60
    )
    for words in ("it_failed", "j-1", "ValueError", "no good", "fail"):
        assert words in done.stderr
    assert "secret" not in done.stderr


_STRANGE = """
import logging, sys
import structlog
from exportd.telemetry.logging import configure_logging, stop_logging

class Unprintable:
    def __repr__(self):
        raise RuntimeError("no repr")
    __str__ = __repr__

class UnprintableError(Exception):
    def __str__(self):
        raise RuntimeError("no str")

configure_logging("info", sys.argv[1], sys.stderr)
log = structlog.get_logger()
endless = []
endless.append(endless)
for value in (
    "\\udcff", b"\\xff", 10**5000, float("nan"), float("inf"), {("a", 1): 2}, {"\\udcff": "\\udcff"}, endless,
    Unprintable(), [Unprintable()], {"a": Unprintable()}, UnprintableError(), object, "\\0\\n\\x1b[31m",
):
    log.info("strange", value=value)
    logging.getLogger("library").warning("strange %s", value)
    logging.getLogger("library").warning("strange %d %d", value)
    logging.getLogger("library").warning(value)
try:
    raise UnprintableError
except UnprintableError:
    log.exception("strange")
    logging.getLogger("library").exception("strange")
log.info("\\udcff", **{"\\udcff": 1})
log.info("last")
stop_logging()
"""


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_line_of_any_values_is_written_and_raises_nothing(form: str) -> None:
    done = subprocess.run([sys.executable, "-c", _STRANGE, form], capture_output=True, check=True, timeout=60)
    lines = done.stderr.decode().splitlines()
    assert "last" in lines[-1]
    assert sum("strange" in line for line in lines) >= 14 * 3 + 2
    assert "Logging error" not in done.stderr.decode()
    if form == "json":
        assert {type(json.loads(line)) for line in lines} == {dict}
