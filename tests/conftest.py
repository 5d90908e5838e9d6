import signal
from asyncio import AbstractEventLoop
from collections.abc import Callable, Mapping

import hypothesis
import structlog
import uvloop

pytest_plugins = [
    "tests.support.postgres",
    "tests.support.application",
    "tests.support.daemon",
    "tests.support.cluster",
]


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], AbstractEventLoop]]:
    """Tests run on the loop that the daemon runs on: its transports differ from asyncio's."""
    return {"uvloop": uvloop.new_event_loop}


# No example has a time limit: on a busy machine any of them may wait for a second.
hypothesis.settings.register_profile(
    "exportd", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("exportd")

# Under nohup, or in the background of a shell, the tests inherit SIGHUP or SIGINT ignored, and so would every
# process that they start. A handler is not inherited: those processes start with the default dispositions.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)

# rich would take up to a minute to draw a ledger's local variables.
structlog.configure(
    processors=[
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ]
)
