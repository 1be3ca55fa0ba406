"""What fits on the device, and how matrix products take their operands: ``python -m benchmarks.gpu.device OUT.json``.

device.cu is compiled here and reads the machine code of the native module.
"""

import json
import subprocess
import sys
from itertools import groupby
from pathlib import Path

from benchmarks.gpu import BUILD

SOURCE = Path(__file__).with_name("device.cu")
KEYS = ("registers", "threads", "shared_bytes", "cluster", "count")


def read(text: str) -> dict:
    """The program's output: "occupancy", a list, and "layouts", the number of wrong values by instruction."""
    occupancy, layouts = [], {}
    for line in text.splitlines():
        kind, name, *numbers = line.split(",")
        if kind == "layout":
            layouts[name] = int(numbers[0])
        else:
            occupancy.append({"unit": kind, "kernel": name, **dict(zip(KEYS, map(int, numbers), strict=True))})
    if not occupancy or not layouts:
        raise ValueError(f"no results in the output of {SOURCE.name}:\n{text}")
    return {"occupancy": occupancy, "layouts": layouts}


def table(occupancy: list[dict]) -> list[str]:
    """One line for each kernel, number of threads and size of shared memory."""

    def launch(row: dict) -> tuple:
        return row["kernel"], row["registers"], row["threads"], row["shared_bytes"]

    lines = [f"{'kernel (registers)':<24} {'threads':>7} {'shared':>7}  blocks per multiprocessor; clusters"]
    for (kernel, registers, threads, shared), (blocks, *clusters) in groupby(occupancy, launch):
        counts = ", ".join(f"{row['count']} of {row['cluster']}" for row in clusters)
        name = f"{kernel} ({registers})"
        lines.append(f"{name:<24} {threads:>7} {shared >> 10:>4} KB  {blocks['count']}{'; ' * bool(counts)}{counts}")
    return lines


def main(out: Path) -> int:
    import torch  # not at the top, nor bnkern: the tables are also made where the module could not be built

    from bnkern import _native
    from bnkern.backends import cuda

    folder = BUILD / "device"
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "device"
    subprocess.run(["nvcc", "-arch=native", "-std=c++20", "-o", program, SOURCE], check=True)
    for cubin in folder.glob("*.cubin"):
        cubin.unlink()
    subprocess.run(["cuobjdump", "-xelf", "all", _native.__file__], cwd=folder, check=True)
    cubins = sorted(folder.glob("*.cubin"))
    process = subprocess.run([program, *cubins], stdout=subprocess.PIPE, text=True)
    print(process.stdout)
    result = read(process.stdout)
    result["clusters"] = list(cuda.clusters_of(0, torch.cuda.get_device_properties(0)))
    out.write_text(json.dumps(result, indent=1) + "\n")
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
