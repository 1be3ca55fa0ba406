"""``python -m bnkern.probes show FOLDER`` prints the report of a flight recorder and draws its steps."""

import argparse
import sys
from pathlib import Path

from .diagnosis import diagnose
from .flight_figure import draw


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit status: 0, or 2 if there is no report."""
    parser = argparse.ArgumentParser(prog="python -m bnkern.probes", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    show = commands.add_parser("show", help="print and draw the report of a flight recorder")
    show.add_argument(
        "folder", type=Path, help="the folder that flight_recorder wrote, or the one with rank0, rank1, ..."
    )
    show.add_argument("--out", type=Path, help="the file of the figure (default: FOLDER/flight.png)")
    chosen = parser.parse_args(arguments)
    try:
        diagnosis = diagnose(chosen.folder)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    print(diagnosis.text(), end="")
    out = chosen.out or chosen.folder / "flight.png"
    try:
        draw(diagnosis, out)
    except ImportError:
        print("The figure needs matplotlib: pip install 'bnkern[draw]'", file=sys.stderr)
    else:
        print(f"\nFigure: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
