"""What the dashboard, the alerts and docs/operations.md name is what the daemon exposes and logs."""

import ast
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient

from exportd.domain.delivery import Method
from exportd.domain.sizes import SIZE_RANGES
from exportd.telemetry.logging import DOWNLOAD_EVENTS
from exportd.web.downloads.recording import FAILURE_REASONS
from tests.support.application import ANN, Jobs, ask_once, noise
from tests.support.programs import require
from tests.support.scrape import samples_of, types_of

REPOSITORY = Path(__file__).parent.parent
ALERTS = REPOSITORY / "deploy" / "prometheus" / "alerts.yml"
DASHBOARD = REPOSITORY / "deploy" / "grafana" / "exportd.json"
OPERATIONS = (REPOSITORY / "docs" / "operations.md").read_text()

# What each label may say; the rest is free text.
VALUES = {
    "reason": set(FAILURE_REASONS),
    "method": set(Method),
    "size": set(SIZE_RANGES),
    "result": {"written", "failed"},
}


@pytest.fixture(scope="module")
def exposition(server_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the application says once every metric has been used."""

    async def ask(client: TestClient[Any, Any], jobs: Jobs) -> str:
        async with client.get(jobs.add(noise(1000)).url, headers=ANN) as response:
            await response.read()
        async with client.get("/metrics") as response:
            return await response.text()

    return ask_once(server_dsn, tmp_path_factory.mktemp("packages"), ask)


def expressions() -> dict[str, str]:
    """Every expression, by the name of its panel or alert."""
    document = json.loads(DASHBOARD.read_text())
    found = {
        f"{panel['title']}/{target['refId']}": target["expr"]
        for panel in document["panels"]
        for target in panel.get("targets", [])
    }
    for variable in document["templating"]["list"]:
        if variable["type"] == "query":
            found[variable["name"]] = variable["query"]["query"]
    rules = re.split(r"- alert: ", ALERTS.read_text())[1:]
    found |= {rule.split("\n")[0]: rule.split("expr:")[1].split(" for: ")[0] for rule in rules}
    return found


def table(heading: str) -> list[list[str]]:
    """The rows of the first table under a heading, as their cells."""
    section = OPERATIONS.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    first = section[section.index("\n| ") :].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in first.strip().split("\n")[2:]]


def quoted(cell: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", cell))


def labels_of(exposition: str) -> dict[str, set[str]]:
    """The labels of each metric, by its name in the table."""
    types = types_of(exposition)
    found: dict[str, set[str]] = {name: set() for name in types}
    for sample in samples_of(exposition):
        name, _, labels = sample.partition("{")
        if name not in types:
            name = re.sub(r"_(bucket|sum|count)$", "", name)
        found[name] |= set(re.findall(r'(\w+)="', labels)) - {"le"}
    return found


@pytest.mark.parametrize("expression", expressions().values(), ids=expressions())
async def test_every_metric_that_is_asked_for_is_exposed(expression: str, exposition: str) -> None:
    labels = labels_of(exposition)
    types = types_of(exposition)
    samples = {
        name + suffix: name
        for name in labels
        for suffix in (("_bucket", "_sum", "_count") if types[name] == "histogram" else ("",))
    }
    asked = re.findall(r"\b(exportd_\w+)(?:\{(.*?)\})?", expression)
    assert asked or "up{" in expression
    for name, selector in asked:
        assert name in samples
        for label, value in re.findall(r'(\w+)=~?"(.*?)"', selector):
            assert label in labels[samples[name]] | {"instance", "job"}
            assert label not in VALUES or set(value.split("|")) <= VALUES[label]
            if label == "state":
                assert f'{label}="{value}"' in exposition


async def test_the_page_lists_every_metric_with_type_and_labels(exposition: str) -> None:
    listed = {name.strip("`"): (kind, quoted(labels)) for name, kind, labels, _ in table("Metrics")}
    types, labels = types_of(exposition), labels_of(exposition)
    assert listed == {name: (types[name], labels[name]) for name in types}


async def test_no_label_holds_what_a_client_or_a_job_brings(exposition: str) -> None:
    allowed = {"route", "status", "reason", "limit", "method", "size", "state", "result", "version", "python"}
    assert set().union(*labels_of(exposition).values()) == allowed


def test_the_page_explains_every_reason() -> None:
    section = OPERATIONS.split("\n| reason | means |\n")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", section, re.MULTILINE) == list(FAILURE_REASONS)


def test_the_page_explains_every_alert_once() -> None:
    alerts = re.findall(r"- alert: (\w+)", ALERTS.read_text())
    section = OPERATIONS.split("\n## Alerts\n")[1].split("\n## ")[0]
    pages, tickets = section.split("These alerts can wait")
    severities = dict(re.findall(r"- alert: (\w+).*?severity: (\w+)", ALERTS.read_text(), re.DOTALL))
    assert sorted(re.findall(r"^\*\*(\w+)\*\*", section, re.MULTILINE)) == sorted(alerts)
    assert set(re.findall(r"^\*\*(\w+)\*\*", pages, re.MULTILINE)) == {
        name for name, severity in severities.items() if severity == "page"
    }
    assert set(severities.values()) == {"page", "ticket"}
    assert "page" not in tickets


def test_every_alert_waits_and_says_what_is_wrong() -> None:
    for rule in re.split(r"- alert: ", ALERTS.read_text())[1:]:
        for key in ("expr: ", "for: ", "severity: ", "summary: ", "description: "):
            assert key in rule, rule


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    document = json.loads(DASHBOARD.read_text())
    source, *_ = document["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    panels = document["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Now", "Traffic", "Downloads", "Delivery", "Ledger and database", "Process"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] != "row":
            for part in (panel, *panel["targets"]):
                assert part["datasource"]["uid"] == f"${{{source['name']}}}"


def promtool(*arguments: object) -> None:
    done = subprocess.run(
        [require("promtool"), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_the_rules() -> None:
    promtool("check", "rules", ALERTS)


async def test_promtool_takes_the_exposition(exposition: str) -> None:
    done = subprocess.run(
        [require("promtool"), "check", "metrics"],
        input=exposition,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_promtool_takes_the_dashboards_expressions(tmp_path: Path) -> None:
    found = {name: text for name, text in expressions().items() if "/" in name}
    rules = [
        {"record": f"panel_{number}", "expr": text.replace("$__rate_interval", "1m")}
        for number, text in enumerate(found.values())
    ]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
    promtool("check", "rules", "--lint=none", file)


# What a metric says minute by minute, in promtool's notation, and the minute by which the alert fires; None:
# it never does.
CASES: list[tuple[str, dict[str, str], int | None]] = [
    ("ExportdDown", {'up{job="exportd",instance="a"}': "1 0x10"}, 4),
    # The clock of these tests begins at 0.
    ("ExportdCleanupOverdue", {'exportd_cleanup_finished_timestamp_seconds{job="e"}': "-172800x20"}, 12),
    (
        "ExportdCleanupOverdue",
        {
            'exportd_cleanup_finished_timestamp_seconds{job="e",instance="a"}': "-172800x20",
            'exportd_cleanup_finished_timestamp_seconds{job="e",instance="b"}': "0x20",
        },
        None,
    ),
    (
        "ExportdPackagesNotDeleted",
        {'exportd_cleanup_packages_total{instance="a",result="failed"}': "0 0 1x10"},
        4,
    ),
    (
        "ExportdPackagesNotDeleted",
        {'exportd_cleanup_packages_total{instance="a",result="waiting"}': "0 0 1x10"},
        None,
    ),
    ("ExportdDown", {'up{job="exportd",instance="a"}': "1 0 1x10"}, None),
    ("ExportdDatabaseAway", {'exportd_database_up{instance="a"}': "1 0x10"}, 4),
    ("ExportdDatabaseAway", {'exportd_database_up{instance="a"}': "1x10"}, None),
    (
        "ExportdStorageFails",
        {'exportd_downloads_failed_total{instance="a",reason="unreadable"}': "0+2x10"},
        8,
    ),
    (
        "ExportdStorageFails",
        {'exportd_downloads_failed_total{instance="a",reason="client_disconnected"}': "0+9x10"},
        None,
    ),
    (
        "ExportdAnswersErrors",
        {
            'exportd_requests_total{instance="a",route="download",status="500"}': "0+10x20",
            'exportd_requests_total{instance="a",route="download",status="200"}': "0+90x20",
        },
        12,
    ),
    (
        "ExportdAnswersErrors",
        {
            'exportd_requests_total{instance="a",route="download",status="404"}': "0+90x20",
            'exportd_requests_total{instance="a",route="download",status="500"}': "0+1x20",
        },
        None,
    ),
    (
        "ExportdEventsNotWritten",
        {'exportd_ledger_flush_seconds_count{instance="a",result="failed"}': "0+1x12"},
        10,
    ),
    (
        "ExportdEventsNotWritten",
        {'exportd_ledger_flush_seconds_count{instance="a",result="failed"}': "0 0 1x20"},
        None,
    ),
    (
        "ExportdEventsNotWritten",
        {'exportd_ledger_flush_seconds_count{instance="a",result="written"}': "0+9x10"},
        None,
    ),
    ("ExportdEventQueueGrows", {'exportd_ledger_waiting_events{instance="a"}': "1001x10"}, 6),
    ("ExportdEventQueueGrows", {'exportd_ledger_waiting_events{instance="a"}': "1000x10"}, None),
    ("ExportdEventsSpooled", {'exportd_spool_events{instance="a"}': "1x20"}, 16),
    ("ExportdEventsSpooled", {'exportd_spool_events{instance="a"}': "0x20"}, None),
    (
        "ExportdDescriptorsNearLimit",
        {
            'exportd_process_open_descriptors{instance="a"}': "830x10",
            'exportd_process_descriptor_limit{instance="a"}': "1024x10",
        },
        6,
    ),
    (
        "ExportdLoopLate",
        {
            'exportd_loop_lag_seconds_bucket{instance="a",le="0.1"}': "0+500x20",
            'exportd_loop_lag_seconds_bucket{instance="a",le="0.25"}': "0+600x20",
            'exportd_loop_lag_seconds_bucket{instance="a",le="+Inf"}': "0+600x20",
        },
        14,
    ),
    (
        "ExportdLoopLate",
        {
            'exportd_loop_lag_seconds_bucket{instance="a",le="0.1"}': "0+598x20",
            'exportd_loop_lag_seconds_bucket{instance="a",le="0.25"}': "0+600x20",
            'exportd_loop_lag_seconds_bucket{instance="a",le="+Inf"}': "0+600x20",
        },
        None,
    ),
    (
        "ExportdPoolExhausted",
        {
            'exportd_database_pool_connections{instance="a",state="in_use"}': "10x10",
            'exportd_database_pool_connections{instance="a",state="idle"}': "0x10",
            'exportd_database_pool_limit{instance="a"}': "10x10",
        },
        6,
    ),
    (
        "ExportdPoolExhausted",
        {
            'exportd_database_pool_connections{instance="a",state="in_use"}': "9x10",
            'exportd_database_pool_connections{instance="a",state="idle"}': "10x10",
            'exportd_database_pool_limit{instance="a"}': "10x10",
        },
        None,
    ),
    ("ExportdPackageChanged", {'exportd_packages{instance="a",state="suspect"}': "1x5"}, 2),
    (
        "ExportdPackageChanged",
        {'exportd_downloads_failed_total{instance="a",reason="changed"}': "0 0 1 1 1 1"},
        4,
    ),
    ("ExportdLogLinesShed", {'exportd_log_lines_shed_total{instance="a"}': "0 0 7 7 7"}, 4),
    (
        "ExportdProcessesDie",
        {
            'exportd_process_starts_total{instance="a"}': "2 2 5 8 11 14",
            'exportd_processes{instance="a"}': "2x5",
        },
        5,
    ),
    (
        "ExportdProcessesDie",
        {'exportd_process_cpu_seconds_total{instance="a"}': "9 1 9 1 9 1 9 1 9 1 9"},
        9,
    ),
    (
        # A reload replaces each process once.
        "ExportdProcessesDie",
        {
            'exportd_process_starts_total{instance="a"}': "4 4 8x5",
            'exportd_processes{instance="a"}': "4 4 8 4x4",
        },
        None,
    ),
]


@pytest.mark.parametrize(("alert", "series", "minute"), CASES, ids=[case[0] for case in CASES])
def test_an_alert_fires_when_it_should(
    alert: str, series: dict[str, str], minute: int | None, tmp_path: Path
) -> None:
    test: dict[str, Any] = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                # What fires is counted, so that the words of the annotations need not be repeated here.
                "promql_expr_test": [
                    {
                        "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)',
                        "eval_time": f"{when}m",
                        "exp_samples": [{"labels": "{}", "value": value}],
                    }
                    for when, value in ([(0, 0), (minute, 1)] if minute is not None else [(4, 0), (15, 0)])
                ],
            }
        ],
    }
    file = tmp_path / "test.yml"
    file.write_text(json.dumps(test))
    promtool("test", "rules", file)


def test_every_alert_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(re.findall(r"- alert: (\w+)", ALERTS.read_text()))


def logged_events() -> dict[tuple[str, str], set[str]]:
    """Every event that the source logs, with its level and the fields that are named at its calls."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in (REPOSITORY / "exportd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name("log"), attr=level),
                    args=[ast.Constant(str(event))],
                    keywords=keywords,
                ) if level in ("debug", "info", "warning", "error", "exception"):
                    fields = {keyword.arg for keyword in keywords if keyword.arg} - {"exc_info"}
                    if level == "exception" or any(keyword.arg == "exc_info" for keyword in keywords):
                        fields.add("exception")
                    level = "error" if level == "exception" else level
                    found.setdefault((event, level), set()).update(fields)
    # The only line that is not logged but made.
    found["log_lines_shed", "warning"] = {"count"}
    return found


def test_the_page_lists_every_event_with_level_and_fields() -> None:
    rows = table("Logs")
    listed = {(event.strip("`"), level): quoted(fields) for event, level, fields, _ in rows}
    assert len(listed) == len(rows)
    logged = logged_events()
    assert set(listed) == set(logged)
    for event, fields in logged.items():
        assert fields <= listed[event], event


def test_no_call_to_the_log_escapes_the_page() -> None:
    """An event whose name is not written out at the call would not be found."""
    calls = sum(
        len(re.findall(r"\blog\.(?:debug|info|warning|error|exception|critical)\(", path.read_text()))
        for path in (REPOSITORY / "exportd").rglob("*.py")
    )
    named = sum(
        len(re.findall(r'\blog\.(?:debug|info|warning|error|exception)\(\s*"\w+"', path.read_text()))
        for path in (REPOSITORY / "exportd").rglob("*.py")
    )
    assert calls == named
    assert {event for event, _ in logged_events()} >= DOWNLOAD_EVENTS
