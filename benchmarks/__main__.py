"""exportd beside its peers: ``python -m benchmarks [NAME] [--quick]``; ``soak``, ``tables`` and
``records`` run only when they are named.

Results of a full run are kept in benchmarks/results/ and shown in docs/performance.md. The exit status says
whether the benchmarks ran, not whether targets were met; a wrong byte or a wrong count is a failure.
"""

import argparse
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

from benchmarks import cleanup, cold, large, many, pacing, records, small, soak, tables
from benchmarks.harness import BenchmarkBroken, open_bench
from benchmarks.load import ClientMissing, LoadFailed
from benchmarks.report import Section, save

BENCHMARKS = {
    "large": large.run,
    "small": small.run,
    "many": many.run,
    "cold": cold.run,
    "pacing": pacing.run,
    "cleanup": cleanup.run,
}


def main() -> int:
    arguments = _parse_arguments()
    signal.signal(signal.SIGTERM, _exit_on_signal)
    started = time.monotonic()
    benchmarks = BENCHMARKS | {
        "soak": partial(soak.run, minutes=arguments.minutes),
        "tables": tables.run,
        "records": partial(records.run, before=arguments.before),
    }
    names = [arguments.name] if arguments.name else list(BENCHMARKS)
    sections = []
    try:
        with open_bench(arguments.quick) as bench:
            for name in names:
                section = Section(name, name)
                sections.append(section)
                try:
                    benchmarks[name](bench, section)
                except ClientMissing as error:
                    section.missing[name] = str(error)
                section.faults += bench.faults
                section.oddities += bench.oddities
                bench.faults, bench.oddities = [], []
                print(f"\n{name}: {section.text(informative=arguments.quick)}", flush=True)
    except (BenchmarkBroken, LoadFailed) as error:
        print(f"benchmarks: broken: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if not arguments.quick:
        save(sections)
    print(f"\n{time.monotonic() - started:.0f} s in all")
    return 1 if any(section.faults for section in sections) else 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "name",
        nargs="?",
        choices=[*BENCHMARKS, "soak", "tables", "records"],
        help="one benchmark; default: all",
    )
    parser.add_argument(
        "--quick", action="store_true", help="small and few: shows that it runs, not how fast; keeps nothing"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to soak; default: 10")
    parser.add_argument(
        "--before", type=Path, help="the checkout of an earlier version, for records; default: none"
    )
    return parser.parse_args()


def _exit_on_signal(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
