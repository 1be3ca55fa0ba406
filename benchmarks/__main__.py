"""``python -m benchmarks table FILE``: a results file as Markdown."""

import argparse
import json
from pathlib import Path

from benchmarks import report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)
    table = commands.add_parser("table", help="print a results file as Markdown")
    table.add_argument("file", type=Path)
    print(report.markdown(json.loads(parser.parse_args().file.read_text())))


if __name__ == "__main__":
    main()
