"""The pure pieces of the benchmarks: what they read, judge and draw."""

import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks.charts import Bar, draw_bars
from benchmarks.load import LoadFailed, parse_wrk
from benchmarks.report import Section, Verdict, percentile

WRK_LINE = (
    '{"requests":1000,"duration_us":2000000,"bytes":65536000,"failed":%d,"p50_us":1500,"p99_us":20000}\n'
)


def test_wrk_output_is_read_from_its_last_line() -> None:
    storm = parse_wrk("Running 2s test @ http://127.0.0.1:1\n  1 threads\n" + WRK_LINE % 0)
    assert (storm.requests, storm.requests_per_second) == (1000, 500.0)
    assert (storm.p50_seconds, storm.p99_seconds) == (0.0015, 0.02)


@pytest.mark.parametrize("output", ["", "unable to connect to 127.0.0.1\n", WRK_LINE % 3])
def test_a_load_that_failed_gives_no_figures(output: str) -> None:
    with pytest.raises(LoadFailed):
        parse_wrk(output)


@pytest.mark.parametrize(
    ("value", "bound", "target", "is_met"),
    [
        (1.0, ">=", 1.0, True),
        (0.999, ">=", 1.0, False),
        (2.0, "<=", 2.0, True),
        (2.001, "<=", 2.0, False),
        (7.0, "", None, None),
    ],
)
def test_verdict_holds_the_value_against_its_target(
    value: float, bound: str, target: float | None, is_met: bool | None
) -> None:
    assert Verdict("what", value, "", bound, target).is_met is is_met


def test_compare_takes_the_ratio_of_medians() -> None:
    section = Section("large", "one package")
    section.add("GB/s", "exportd", [1.0, 3.0, 9.0])
    section.add("GB/s", "nginx", [2.0, 1.0, 40.0])
    section.compare("GB/s", "exportd", "nginx", at_least=2.0)
    (verdict,) = section.verdicts
    assert (verdict.value, verdict.word) == (1.5, "MISSED")
    assert "MISSED" in section.text(informative=False)


def test_compare_with_a_peer_that_is_missing_says_nothing() -> None:
    section = Section("large", "one package", missing={"nginx": "nginx is not installed"})
    section.add("GB/s", "exportd", [1.0])
    section.compare("GB/s", "exportd", "nginx", at_least=1.0)
    assert section.verdicts == []
    assert "not measured: nginx: nginx is not installed" in section.text(informative=False)


@pytest.mark.parametrize(("percent", "value"), [(99, 99), (100, 100), (50, 50), (1, 1), (0, 1)])
def test_percentile_is_the_nearest_rank(percent: float, value: float) -> None:
    assert percentile([float(number) for number in range(100, 0, -1)], percent) == value


def test_chart_is_well_formed_and_names_every_bar() -> None:
    drawn = draw_bars("a < b & c", "GB/s", [Bar("exportd", 3.5, True), Bar("<nginx>", 7.0, False)])
    root = ElementTree.fromstring(drawn)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["a < b & c", "exportd", "3.5 GB/s", "<nginx>", "7 GB/s"]
    widths = [
        float(element.attrib["width"])
        for element in root.iter("{http://www.w3.org/2000/svg}rect")
        if "bar" in element.attrib["class"].split()
    ]
    assert widths[0] * 2 == pytest.approx(widths[1], abs=0.2)
    assert "prefers-color-scheme: dark" in drawn
