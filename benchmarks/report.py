"""What was measured: as a table for the terminal, as JSON that is kept, as charts and a table in docs/."""

import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.charts import Bar, draw_bars
from benchmarks.harness import PEERS, REPOSITORY

RESULTS = Path(__file__).parent / "results" / "latest.json"
_IMAGES = REPOSITORY / "docs" / "images"
_PAGE = REPOSITORY / "docs" / "performance.md"
_TABLE = re.compile(r"(?<=<!-- results -->\n).*?(?=<!-- /results -->)", re.DOTALL)

_LOAD_AT_START = os.getloadavg()[0]
_LIBRARIES = ("exportd", "aiohttp", "aiopg", "uvloop", "PyJWT", "structlog")


@dataclass(frozen=True)
class Figure:
    """What one subject did by one measure, such as nginx by ``GB/s``, round by round."""

    measure: str
    subject: str
    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


@dataclass(frozen=True)
class Verdict:
    """A figure beside its target. ``bound`` is ``>=``, ``<=``, or empty where there is no target."""

    what: str
    value: float
    unit: str = ""
    bound: str = ""
    target: float | None = None

    @property
    def is_met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value >= self.target if self.bound == ">=" else self.value <= self.target

    @property
    def word(self) -> str:
        return {True: "met", False: "MISSED", None: "no target"}[self.is_met]

    @property
    def shown_target(self) -> str:
        return "" if self.target is None else _amount(f"{self.bound} {self.target:g}", self.unit)


@dataclass
class Section:
    """One benchmark's results.

    ``missing`` holds what could not be measured, and why; ``faults`` what went wrong, which is worse than a
    missed target; ``oddities`` what went wrong with a peer.
    """

    name: str
    title: str
    figures: list[Figure] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    oddities: list[str] = field(default_factory=list)

    def add(self, measure: str, subject: str, rounds: Sequence[float]) -> Figure:
        figure = Figure(measure, subject, tuple(rounds))
        self.figures.append(figure)
        return figure

    def find(self, measure: str, subject: str) -> Figure | None:
        found = (one for one in self.figures if (one.measure, one.subject) == (measure, subject))
        return next(found, None)

    def compare(
        self,
        measure: str,
        subject: str,
        peer: str,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Holds the ratio of two medians against a target. A peer that is missing gives no ratio."""
        ours, theirs = self.find(measure, subject), self.find(measure, peer)
        if ours is not None and theirs is not None:
            ratio = ours.median / theirs.median
            self.hold(f"{measure}: {subject} / {peer}", ratio, at_least=at_least, at_most=at_most)

    def hold(
        self,
        what: str,
        value: float,
        unit: str = "",
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Holds a value against a target, if there is one."""
        if at_least is not None:
            self.verdicts.append(Verdict(what, value, unit, ">=", at_least))
        elif at_most is not None:
            self.verdicts.append(Verdict(what, value, unit, "<=", at_most))
        else:
            self.verdicts.append(Verdict(what, value, unit))

    def text(self, *, informative: bool) -> str:
        """The table. ``informative``: from a quick run, so that a miss is no miss."""
        lines = [self.title]
        rows = [
            (figure.measure, figure.subject, f"{figure.median:.3g}", _spread(figure))
            for figure in self.figures
        ]
        lines += _columns([("measure", "of", "median", "lowest to highest"), *rows]) if rows else []
        verdicts = [
            (one.what, _amount(_number(one.value), one.unit), one.shown_target, one.word)
            for one in self.verdicts
        ]
        judged = "verdict, of a quick run: informative only" if informative else "verdict"
        lines += ["", *_columns([("ratio or limit", "is", "target", judged), *verdicts])] if verdicts else []
        lines += [f"  not measured: {what}: {why}" for what, why in self.missing.items()]
        lines += [f"  a peer's count: {oddity}" for oddity in self.oddities]
        lines += [f"  BROKEN: {fault}" for fault in self.faults]
        return "\n".join(lines)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]


def save(sections: Sequence[Section]) -> None:
    """Keeps the sections, in the place of older ones of their names, and brings the pages up to date."""
    kept = json.loads(RESULTS.read_text())["benchmarks"] if RESULTS.exists() else {}
    measured_at = datetime.now(UTC).isoformat(timespec="seconds")
    for section in sections:
        kept[section.name] = {
            "title": section.title,
            "measured_at": measured_at,
            "figures": [asdict(one) | {"median": one.median} for one in section.figures],
            "verdicts": [asdict(one) | {"met": one.is_met} for one in section.verdicts],
            "not_measured": section.missing,
            "faults": section.faults,
            "oddities": section.oddities,
        }
    document = {"machine": describe_machine(), "versions": find_versions(), "benchmarks": kept}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(_round(json.dumps(document, indent=1, ensure_ascii=False)) + "\n")
    publish(document)


def publish(document: dict[str, Any]) -> None:
    """Draws the charts of kept results and writes their table into docs/performance.md."""
    _IMAGES.mkdir(exist_ok=True)
    for name, (benchmark, measure, title, unit) in CHARTS.items():
        figures = document["benchmarks"].get(benchmark, {}).get("figures", [])
        bars = [
            Bar(one["subject"], one["median"], one["subject"].startswith("exportd"))
            for one in figures
            if one["measure"] == measure
        ]
        if bars:
            (_IMAGES / f"{name}.svg").write_text(draw_bars(title, unit, bars))
    table = _markdown(document)
    _PAGE.write_text(_TABLE.sub(lambda _: table, _PAGE.read_text()))


# name of the image: benchmark, measure, title, unit
CHARTS = {
    "large": ("large", "GB/s", "1 GiB over one connection, warm", "GB/s"),
    "cpu": ("large", "CPU-seconds per GB", "The server's CPU time for 1 GB: less is better", "s"),
    "tls": ("large", "GB/s over TLS 1.3", "1 GiB over one connection, TLS 1.3", "GB/s"),
    "small": ("small", "requests/s", "64 KiB packages, 64 connections, each download counted", "requests/s"),
}


def describe_machine() -> dict[str, object]:
    """What the figures depend on, and nothing that names the machine."""
    models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        # What others were doing on the machine meanwhile; 0 is nothing.
        "load_at_start": round(_LOAD_AT_START, 1),
        "system": f"Linux {'.'.join(platform.release().split('.')[:2])}",
    }


def find_versions() -> dict[str, str]:
    """Versions of everything that took part, as far as it is here."""
    versions = {"Python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}
    for line in (PEERS / "starlette" / "requirements.txt").read_text().splitlines():
        name, _, pinned = line.partition("==")
        versions[f"{name} (Starlette's)"] = pinned
    versions |= json.loads((PEERS / "express" / "package.json").read_text())["dependencies"]
    for program, option in (("nginx", "-v"), ("wrk", "-v"), ("curl", "--version"), ("node", "--version")):
        if path := shutil.which(program):
            done = subprocess.run([path, option], capture_output=True, text=True, check=False)
            if found := re.search(r"\d+(\.\d+)+", done.stdout + done.stderr):
                versions[program] = found[0]
    return versions


def _markdown(document: dict[str, Any]) -> str:
    machine = document["machine"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}; "
        f"load average {machine['load_at_start']} before the run.",
        "",
        "| benchmark | ratio or limit | is | target | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, section in document["benchmarks"].items():
        for said in section["verdicts"]:
            verdict = Verdict(**{key: value for key, value in said.items() if key != "met"})
            word = "**missed**" if verdict.is_met is False else verdict.word
            value = _amount(_number(verdict.value), verdict.unit)
            lines.append(f"| {name} | {verdict.what} | {value} | {verdict.shown_target} | {word} |")
        for what, why in section["not_measured"].items():
            lines.append(f"| {name} | {what} | not measured: {why} | | |")
        lines.extend(
            f"| {name} | {oddity} | | | a peer's count |" for oddity in sorted(set(section["oddities"]))
        )
        lines.extend(f"| {name} | {fault} | | | **wrong** |" for fault in sorted(set(section["faults"])))
    return "\n".join(lines) + "\n"


def _amount(value: str, unit: str) -> str:
    return f"{value} {unit}".rstrip()


def _number(value: float) -> str:
    return f"{value:g}" if value == int(value) else f"{value:.2f}"


def _spread(figure: Figure) -> str:
    return f"{min(figure.rounds):.3g} to {max(figure.rounds):.3g}"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[number]) for row in rows) for number in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _round(text: str) -> str:
    """Four significant digits: the rest is noise, in the figures and in the diffs."""
    return re.sub(r"-?\d+\.\d{4,}(e-?\d+)?", lambda found: f"{float(found[0]):.4g}", text)
