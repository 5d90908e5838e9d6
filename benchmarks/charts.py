"""Bar charts as SVG. One file is readable on light pages and dark ones: it brings its own ground, and asks
which of the two the reader prefers."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _BAR, _GAP, _TOP, _LABELS, _VALUES = 720, 26, 12, 58, 190, 120

_STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #1f2328 }
  .title { font-weight: 600; font-size: 16px }
  .ground { fill: #ffffff }
  .bar { fill: #8c959f }
  .ours { fill: #0969da }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .ground { fill: #0d1117 }
    .bar { fill: #6e7681 }
    .ours { fill: #58a6ff }
  }
"""


@dataclass(frozen=True)
class Bar:
    """One line of a chart; ``is_ours`` is drawn in the other colour."""

    label: str
    value: float
    is_ours: bool


def draw_bars(title: str, unit: str, bars: Sequence[Bar]) -> str:
    """The chart's SVG, the bars from the top in the order given, from zero on a linear scale."""
    height = _TOP + len(bars) * (_BAR + _GAP) + _GAP
    largest = max(bar.value for bar in bars)
    said = "; ".join(f"{bar.label} {_number(bar.value)} {unit}" for bar in bars)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
        f'height="{height}" role="img" aria-label="{escape(f"{title}: {said}")}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="ground" width="{_WIDTH}" height="{height}" rx="8"/>',
        f'<text class="title" x="20" y="34">{escape(title)}</text>',
    ]
    for number, bar in enumerate(bars):
        value = f"{_number(bar.value)} {escape(unit)}"
        top = _TOP + number * (_BAR + _GAP)
        width = max(1.0, bar.value / largest * (_WIDTH - _LABELS - _VALUES)) if largest else 1.0
        baseline = top + _BAR / 2 + 5
        parts += [
            f'<text x="{_LABELS - 12}" y="{baseline:g}" text-anchor="end">{escape(bar.label)}</text>',
            f'<rect class="bar{" ours" if bar.is_ours else ""}" x="{_LABELS}" y="{top}" '
            f'width="{width:.1f}" height="{_BAR}" rx="3"/>',
            f'<text x="{_LABELS + width + 8:.1f}" y="{baseline:g}">{value}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
