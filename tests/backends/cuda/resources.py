"""What nvcc compiles the CUDA kernels to: registers, bytes of stack, the width of loads and stores. Needs no GPU.

resources.json holds [registers, bytes of stack] by the version of nvcc, the architecture and the kernel. Shared memory
is requested at the launch. ``python -m tests.backends.cuda.resources --write`` compiles all kernels for all
architectures and replaces the entries of this version; without ``--write`` it prints them.
"""

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import ROOT

TABLE = Path(__file__).with_name("resources.json")
ARCHITECTURES = (80, 90, 100)
FLAGS = ("-std=c++20", "--fmad=false", "-Xcompiler=-ffp-contract=off", "-O3")
MOST_INSTANCES = 150


def tool(name: str) -> str | None:
    """The path of cuobjdump or nvdisasm, from the toolkit or from Triton."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" / name if triton and triton.origin else None
    return shutil.which(name) or (str(bundled) if bundled and bundled.exists() else None)


def nvcc_version() -> str | None:
    if not shutil.which("nvcc"):
        return None
    message = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+)", message)[1]


def cuobjdump(*arguments: str) -> str:
    """The output of cuobjdump with demangled names. It finds nvdisasm in its own folder."""
    program = tool("cuobjdump")
    environment = os.environ | {"PATH": f"{Path(program).parent}{os.pathsep}{os.environ['PATH']}"}
    message = subprocess.run([program, *arguments], capture_output=True, text=True, check=True, env=environment).stdout
    return subprocess.run(["c++filt"], input=message, capture_output=True, text=True, check=True).stdout


def _name(function: str) -> str:
    """``void bnkern::(anonymous namespace)::planes_forward_kernel<bnkern::BFloat16, true, false>(...)`` without all
    that is the same everywhere."""
    return re.sub(r"bnkern::|\(anonymous namespace\)::|^void ", "", function).split("(")[0]


def usage(binary: Path, architecture: int) -> dict[str, tuple[int, int]]:
    """Registers and bytes of stack, including spills, of each kernel in a file of machine code."""
    text = cuobjdump("-res-usage", "-arch", f"sm_{architecture}", str(binary))
    result = re.findall(r"Function (.+):\n\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text)
    return {_name(name): (int(registers), int(stack) + int(local)) for name, registers, stack, local in result}


def accesses(binary: Path, architecture: int) -> dict[str, dict[str, int]]:
    """The number of 16-byte loads and stores of each kernel, in global memory or by generic addresses (sm_100)."""
    text = cuobjdump("-sass", "-arch", f"sm_{architecture}", str(binary))
    results = {}
    for name, body in re.findall(r"Function : ([^\n]+)\n(.*?)(?=Function : |\Z)", text, re.DOTALL):
        results[_name(name)] = {word: len(re.findall(rf"\b{word}G?\.E\.[\w.]*128", body)) for word in ("LD", "ST")}
    return results


@functools.cache
def compiled(architecture: int) -> Path:
    """A file with the machine code of all kernels: the native module if it has this architecture, or a new library."""
    from bnkern import _native

    built = _native.build_info()["cuda_archs"]
    if str(architecture) in built or f"{architecture}-real" in built:
        return Path(_native.__file__)
    library = Path(tempfile.mkdtemp()) / "kernels.a"
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    sources = map(str, sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
    subprocess.run(["nvcc", *FLAGS, "-t2", target, "-lib", "-o", str(library), *sources], check=True)
    return library


def main() -> None:
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table[nvcc_version()] = {
        f"sm_{architecture}": dict(sorted(usage(compiled(architecture), architecture).items()))
        for architecture in ARCHITECTURES
    }
    text = re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", json.dumps(table, indent=1))  # one kernel per line
    if "--write" in sys.argv:
        TABLE.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
