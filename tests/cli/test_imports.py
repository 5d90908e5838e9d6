"""Commands that only print import nothing that takes long."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SLOW_LIBRARIES = {"aiohttp", "aiopg", "asyncio", "gunicorn", "marshmallow", "structlog", "uvloop", "yoyo"}

PROGRAM = """
import json, sys
from exportd.cli.main import main
try:
    main()
finally:
    print(json.dumps(sorted(sys.modules)))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["token", "--user", "ann"], ["serve", "--help"]])
def test_a_command_that_prints_imports_no_slow_library(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=tmp_path,
        env={"EXPORTD_DATA_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        check=True,
        text=True,
    )
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert "exportd.cli.main" in imported
    assert not imported & SLOW_LIBRARIES
