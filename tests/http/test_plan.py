import pytest

from exportd.http.plan import plan_response


@pytest.mark.parametrize(
    ("method", "fields", "size", "status", "headers"),
    [
        ("GET", [], 1000, 200, {"Content-Length": "1000"}),
        ("GET", ["bytes=0-0"], 1000, 206, {"Content-Length": "1", "Content-Range": "bytes 0-0/1000"}),
        ("GET", ["bytes=0-"], 1000, 206, {"Content-Length": "1000", "Content-Range": "bytes 0-999/1000"}),
        ("GET", ["bytes=1000-"], 1000, 416, {"Content-Range": "bytes */1000"}),
        ("GET", ["bytes=5-4"], 1000, 200, {"Content-Length": "1000"}),
        # Range is defined for GET alone (section 14.2).
        ("HEAD", ["bytes=0-0"], 1000, 200, {"Content-Length": "1000"}),
        ("HEAD", ["bytes=1000-"], 1000, 200, {"Content-Length": "1000"}),
        # Two fields are as invalid as a broken one.
        ("GET", ["bytes=0-0", "bytes=1-1"], 1000, 200, {"Content-Length": "1000"}),
        # An empty package has no byte that a range could name.
        ("GET", ["bytes=0-0"], 0, 200, {"Content-Length": "0"}),
        ("GET", ["bytes=-1"], 0, 200, {"Content-Length": "0"}),
    ],
)
def test_plan(method: str, fields: list[str], size: int, status: int, headers: dict[str, str]) -> None:
    plan = plan_response(method, fields, size)
    assert (plan.status, plan.headers) == (status, headers)
    if status != 416:
        assert plan.body_length == int(headers["Content-Length"])
