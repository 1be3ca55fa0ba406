"""Results files of the benchmarks: ``table FILE``, ``report FILE [OTHER]``, ``merge OUT FILE...``."""

import argparse
import json
from pathlib import Path

from benchmarks.report import tables
from benchmarks.tools import measurements


def _read(path: Path) -> dict:
    results = json.loads(path.read_text())
    if results.get("format") != measurements.FORMAT:
        raise SystemExit(f"{path} has format {results.get('format')}; only format {measurements.FORMAT} can be read")
    return results


def _table(args: argparse.Namespace) -> None:
    print(tables.markdown(_read(args.file)))


def _report(args: argparse.Namespace) -> None:
    from benchmarks.report import page  # needs matplotlib

    print(page.report(_read(args.file), args.out, _read(args.other) if args.other else None))


def _merge(args: argparse.Namespace) -> None:
    args.out.write_text(measurements.dump(measurements.merged([_read(path) for path in args.files])))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)
    table = commands.add_parser("table", help="print a results file as Markdown")
    table.add_argument("file", type=Path)
    table.set_defaults(run=_table)
    report = commands.add_parser(
        "report", help="write a page and Markdown with figures, and a comparison with another file"
    )
    report.add_argument("file", type=Path)
    report.add_argument(
        "other", type=Path, nargs="?", help="older results; the report then lists the changes beyond the noise"
    )
    report.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder to write into")
    report.set_defaults(run=_report)
    merge = commands.add_parser("merge", help="join files of one machine and commit; later files win")
    merge.add_argument("out", type=Path)
    merge.add_argument("files", type=Path, nargs="+")
    merge.set_defaults(run=_merge)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
