"""What a log line shows, and what it must not."""

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
