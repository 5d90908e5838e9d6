"""Steers what schemathesis makes up: every other job is there, every other condition is near to sense."""

import os
import re
import zlib
from typing import Any

import schemathesis

JOB_IDS = tuple(os.environ["EXPORTD_TESTS_JOB_IDS"].split())
ETAG = os.environ["EXPORTD_TESTS_ETAG"]
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
RANGES = ("bytes=0-9", "bytes=-1", "bytes=0-9,20-29", "bytes=999999-", "bytes=9-0")
CONDITIONS = (ETAG, f'"x", {ETAG}', '"x"', "*", f"W/{ETAG}", "Fri, 24 Oct 2025 12:00:00 GMT")


def _choose(made_up: object, real: tuple[str, ...]) -> Any:
    """By the value itself, so that a case is the same whenever it is sent."""
    number = zlib.crc32(str(made_up).encode("utf-8", "surrogatepass"))
    return real[number // 2 % len(real)] if number % 2 else made_up


@schemathesis.hook
def map_path_parameters(_: Any, path_parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    # What is no UUID is there to be refused.
    if path_parameters and UUID.fullmatch(str(path_parameters.get("job_id"))):
        return path_parameters | {"job_id": _choose(path_parameters["job_id"], JOB_IDS)}
    return path_parameters


@schemathesis.hook
def map_headers(_: Any, headers: Any) -> Any:
    for name in list(headers or ()):
        if name == "Range":
            headers[name] = _choose(headers[name], RANGES)
        elif name in ("If-Match", "If-Unmodified-Since"):
            # They are judged first, and so mostly hold.
            headers[name] = _choose(headers[name], (f'"x", {ETAG}', "*"))
        elif name.startswith("If-"):
            headers[name] = _choose(headers[name], CONDITIONS)
    return headers
