"""What nvcc compiles the CUDA kernels to: registers, code size, loads and barriers. Needs no GPU.

resources.json holds :class:`Resources` by the version of nvcc, the architecture and the kernel. Shared memory is
requested at the launch. ``python -m tests.backends.cuda.resources --write`` compiles all kernels for all architectures
and replaces the entries of this version; without ``--write`` it prints them.
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
from typing import NamedTuple

from tests import ROOT

TABLE = Path(__file__).with_name("resources.json")
ARCHITECTURES = (80, 90, 100)
FLAGS = ("-std=c++20", "--fmad=false", "-Xcompiler=-ffp-contract=off", "-O3")
MOST_INSTANCES = 150


class Resources(NamedTuple):
    """A kernel's resources, read from its machine code.

    Instructions are counted in the order of the code, which is not always the order in which they run. A load is
    waited for where an instruction names a register that it writes.
    """

    registers: int
    stack: int  # bytes, including spills
    code: int  # bytes
    vector_loads: int  # of 16 bytes
    vector_stores: int
    before_loads: int  # instructions before the first load of 16 bytes, -1 if there is none
    first_loads: int  # loads of 16 bytes before the first of them is waited for
    first_bytes: int  # loads of one byte, of the mask, before that point
    parts_in_flight: int  # the most loads of 8 bytes, of other blocks' parts, before the first of them is waited for
    ahead: int  # loads of 16 bytes in loops that only moves at the end of the pass, or the next pass, wait for
    while_waiting: int  # loads of 16 bytes between the arrival at a barrier of blocks and the wait
    scalars_while_waiting: int  # loads of 1, 2 or 4 bytes there: coefficients and running statistics, once per dtype
    scalars_late: int  # the same from the wait to the first store of 16 bytes
    shuffles: int
    arrival: str  # the instruction of the first arrival. Only an ATOM has a result, for which its warp waits
    cluster_barriers: str  # the halves of cluster barriers in order: R and r arrive with release and relaxed, w waits


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


# LD is a load by a generic address, which sm_100 has in a few kernels.
_VECTOR_LOAD = re.compile(r"\bLDG?\.E\.[\w.]*128 R(\d+)")
_VECTOR_STORE = re.compile(r"\bSTG?\.E\.[\w.]*128")
_BYTE_LOAD = re.compile(r"\bLDG?\.E\.U8")
_PART_LOAD = re.compile(r"\bLDG?\.E\.64 R(\d+)")
_SCALAR_LOAD = re.compile(r"\bLDG?\.E(\.[US](8|16))? ")
_ARRIVAL = re.compile(r"\b(ATOM|RED)G?\.|\b(UCGABAR)_ARV")
_MOVE = re.compile(r"(@!?U?P\d )?(IMAD\.)?MOV")
_WAIT = re.compile(r"\bLDG?\.E\.STRONG\.GPU|\bUCGABAR_WAIT")


def _names_one_of(instruction: str, registers: set[int]) -> bool:
    return any(int(number) in registers for number in re.findall(r"\bR(\d+)\b", instruction))


def _in_flight(code: list[str], load: re.Pattern, width: int, start: int) -> tuple[int, int]:
    """The number of matching loads from ``start`` on before one of them is waited for, and the index of the wait."""
    pending: set[int] = set()
    loads = 0
    for index in range(start, len(code)):
        if _names_one_of(code[index].split("desc")[0] if load.search(code[index]) else code[index], pending):
            return loads, index
        if match := load.search(code[index]):
            pending |= set(range(int(match[1]), int(match[1]) + width))
            loads += 1
    return loads, len(code)


def _ahead(addresses: list[int], code: list[str]) -> int:
    """The vector loads of loops for which nothing but moves waits before the end of the loop."""
    index_of = {address: index for index, address in enumerate(addresses)}
    found = set()
    for end, instruction in enumerate(code):
        target = re.search(r"\bBRA(?:\.U)? (?:`\(\S+\)|!?U?P\d, )?0x([0-9a-f]+)", instruction)
        if not target or int(target[1], 16) >= addresses[end]:
            continue
        for index in range(index_of[int(target[1], 16)], end):
            if match := _VECTOR_LOAD.search(code[index]):
                registers = set(range(int(match[1]), int(match[1]) + 4))
                later = [instruction for instruction in code[index + 1 : end] if not _MOVE.match(instruction)]
                if not any(_names_one_of(instruction, registers) for instruction in later):
                    found.add(index)
    return len(found)


def _cluster_barriers(code: list[str]) -> str:
    halves = ""
    for index, instruction in enumerate(code):
        if "UCGABAR_ARV" in instruction:
            halves += "R" if any("MEMBAR" in before for before in code[max(0, index - 6) : index]) else "r"
        elif "UCGABAR_WAIT" in instruction:
            halves += "w"
    return halves


def _resources(registers: int, stack: int, body: str) -> Resources:
    lines = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;\s+/\* 0x", body)
    addresses, code = [int(address, 16) for address, _ in lines], [instruction for _, instruction in lines]
    first = next((index for index, instruction in enumerate(code) if _VECTOR_LOAD.search(instruction)), -1)
    first_loads, waited = _in_flight(code, _VECTOR_LOAD, 4, first) if first >= 0 else (0, 0)
    parts = [index for index, instruction in enumerate(code) if _PART_LOAD.search(instruction)]
    arrival = next((index for index, instruction in enumerate(code) if _ARRIVAL.search(instruction)), len(code))
    wait = next((i for i, instruction in enumerate(code) if i > arrival and _WAIT.search(instruction)), arrival)
    stores = (index for index, instruction in enumerate(code) if _VECTOR_STORE.search(instruction))
    store = next((index for index in stores if index > wait), len(code))
    kind = _ARRIVAL.search(code[arrival]) if arrival < len(code) else None

    def scalars(start: int, end: int) -> int:
        return sum(bool(_SCALAR_LOAD.search(instruction)) for instruction in code[start:end])

    return Resources(
        registers=registers,
        stack=stack,
        code=16 * len(code),
        vector_loads=sum(bool(_VECTOR_LOAD.search(instruction)) for instruction in code),
        vector_stores=sum(bool(_VECTOR_STORE.search(instruction)) for instruction in code),
        before_loads=first,
        first_loads=first_loads,
        first_bytes=sum(bool(_BYTE_LOAD.search(instruction)) for instruction in code[:waited]),
        parts_in_flight=max((_in_flight(code, _PART_LOAD, 2, index)[0] for index in parts), default=0),
        ahead=_ahead(addresses, code),
        while_waiting=sum(bool(_VECTOR_LOAD.search(instruction)) for instruction in code[arrival:wait]),
        scalars_while_waiting=scalars(arrival, wait),
        scalars_late=scalars(wait, store) if wait > arrival else 0,
        shuffles=sum("SHFL" in instruction for instruction in code),
        arrival=(kind[1] or kind[2]) if kind else "",
        cluster_barriers=_cluster_barriers(code),
    )


@functools.cache
def read(binary: Path, architecture: int) -> dict[str, Resources]:
    """The resources of each kernel in a file of machine code."""
    target = ("-arch", f"sm_{architecture}", str(binary))
    usage = re.findall(r"Function (.+):\n\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", cuobjdump("-res-usage", *target))
    registers = {_name(name): (int(number), int(stack) + int(local)) for name, number, stack, local in usage}
    bodies = re.findall(r"Function : ([^\n]+)\n(.*?)(?=Function : |\Z)", cuobjdump("-sass", *target), re.DOTALL)
    return {_name(name): _resources(*registers[_name(name)], body) for name, body in bodies}


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
        f"sm_{architecture}": dict(sorted(read(compiled(architecture), architecture).items()))
        for architecture in ARCHITECTURES
    }
    lines = re.sub(r"\n {3,}(?! *\"\w+[<_])", " ", json.dumps(table, indent=1))  # one kernel per line
    text = re.sub(r"\[ | (?=\])", lambda bracket: bracket[0].strip(), lines)
    if "--write" in sys.argv:
        TABLE.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
