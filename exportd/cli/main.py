"""The command line. Every failure is one line on stderr and a non-zero exit status, never a traceback.

Commands import other rooms inside their functions. Otherwise `exportd --help` and `exportd token` would load
every module.
"""

import signal
from typing import NoReturn

import click

from exportd import __version__
from exportd.cli.admin import cleanup, migrate, stats, token, verify
from exportd.cli.common import fail
from exportd.cli.demo import demo
from exportd.cli.publish import publish
from exportd.cli.serve import packer, serve
from exportd.errors import OperatorError


def main() -> None:
    """The console script."""
    signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        cli.main(prog_name="exportd", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except click.Abort:
        fail("interrupted", status=130)
    except OperatorError as error:
        fail(*error.problems)
    except OSError as error:
        fail(str(error))


def _exit_on_signal(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


@click.group()
@click.version_option(__version__, prog_name="exportd")
def cli() -> None:
    """Serves finished export packages to the users who may download them."""


for command in (serve, packer, publish, token, stats, cleanup, verify, migrate, demo):
    cli.add_command(command)
