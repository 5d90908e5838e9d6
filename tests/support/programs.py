"""Programs that tests drive and that a user's machine may lack."""

import os
import shutil

import pytest


def require(program: str) -> str:
    """The program's path. Where it is missing the test skips and says why; in CI it fails."""
    path = shutil.which(program)
    if path is None:
        reason = f"{program} is not installed"
        if os.environ.get("EXPORTD_TESTS_REQUIRE_PROGRAMS"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path
