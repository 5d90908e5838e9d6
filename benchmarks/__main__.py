"""``python -m benchmarks [NAME]`` runs one benchmark, or all; ``--help`` lists them."""

import argparse
import sys

from benchmarks import large

BENCHMARKS = {"large": large.run}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", choices=sorted(BENCHMARKS), help="the benchmark; default: all")
    parser.add_argument(
        "--quick", action="store_true", help="small and few: shows that it runs, not how fast"
    )
    arguments = parser.parse_args()
    names = [arguments.name] if arguments.name else sorted(BENCHMARKS)
    return max(BENCHMARKS[name](arguments.quick) for name in names)


if __name__ == "__main__":
    sys.exit(main())
