"""The native module as built, `python -m bnkern`, and the set-up files, on which a user's first commands depend."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import torch

from bnkern import _native as native  # its absence is an error here: every install builds it
from tests import ROOT

needs_cuda_parts = pytest.mark.skipif(not native.build_info()["cuda"], reason="built without CUDA")


def python(code: str) -> str:
    """The output of a new interpreter that runs ``code``."""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def binutil(*command: str) -> str:
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# ---- the module


def test_build_info_names_the_parts():
    info = native.build_info()
    x86 = platform.machine() in ("x86_64", "AMD64")
    assert info["isas"] == (["generic", "avx2", "avx512"] if x86 else ["generic"])
    assert bool(info["cuda"]) == bool(info["cuda_archs"]) == hasattr(native, "cuda_merge")
    assert re.match(r"(g\+\+|clang\+\+) \d", info["compiler"])


def test_links_only_the_language_runtimes():
    # Without libtorch one build serves every version of torch. Without libcudart and libcuda no driver is needed.
    needed = set(re.findall(r"NEEDED.*\[(\w+[\w+-]*)\.so", binutil("readelf", "-d", native.__file__)))
    assert needed <= {
        "libstdc++",
        "libgcc_s",
        "libgomp",
        "libc",
        "libm",
        "libpthread",
        "libdl",
        "librt",
        "ld-linux-x86-64",
    }


def test_exports_nothing_that_could_collide_with_another_library():
    exported = binutil("nm", "-D", "--defined-only", "-C", native.__file__)
    assert "PyInit__native" in exported
    assert not re.findall(r".* (?:bnkern::|cuda\w+$).*", exported, re.MULTILINE)


def test_imports_without_torch():
    assert "torch" not in python(
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_native', {native.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.build_info(), *sys.modules)"
    )


def test_wider_instruction_sets_stay_in_their_own_objects():
    # The linker keeps one copy of an inline function, for example of the standard library. If that copy were compiled
    # for AVX-512, older machines would crash. So an object for one set may define shared functions only under that
    # set's name.
    objects = list(ROOT.glob("build/native-*/CMakeFiles/cpu_avx*.dir/**/*.o"))
    if not objects:
        pytest.skip("there are no object files in this tree")
    for path in objects:
        isa = re.search(r"cpu_(avx\w+)\.dir", str(path))[1]
        shared = re.findall(r"FUNC +WEAK +\w+ +\d+ (.+)", binutil("readelf", "-sWC", str(path)))
        assert not [name for name in shared if f"bnkern::{isa}::" not in name], path.name


@needs_cuda_parts
def test_cuda_errors_are_text():
    with pytest.raises(RuntimeError, match="merge: statistics are float32 or float64"):
        native.cuda_merge(1, 0, 0, 0, 0, 0, 0, 1, 1, 0)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"merge: .*\(cudaError\w+\)"):
            native.cuda_merge(0, 0, 0, 0, 0, 0, 0, 1, 1, 0)


@needs_cuda_parts
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_cuda_merge(dtype):
    from bnkern.backends import cuda

    # Networks have between 16 and 2048 channels. A count of zero in the middle must change nothing.
    for channels in (1, 16, 2048):
        count = torch.tensor([128.0, 0.0, 1.0, 32768.0], dtype=dtype, device="cuda")
        mean, m2 = (torch.rand(2, 4, channels, dtype=torch.float64, device="cuda") * count[:, None]).to(dtype)
        parts = [count, mean, m2]
        merged = cuda.merge(*parts)
        n, a, s = (t.double() for t in parts)
        total = n.sum()
        expected_mean = (n[:, None] * a).sum(0) / total
        expected_m2 = (s + n[:, None] * (a - expected_mean).square()).sum(0)
        # Three merges, each a handful of roundings.
        tolerance = 32 * torch.finfo(dtype).eps
        for actual, expected in zip(merged, (total, expected_mean, expected_m2), strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=0)


# ---- the package


def test_importing_bnkern_loads_no_kernels():
    loaded = python("import sys, bnkern; print(*sys.modules, sep='\\n')").split()
    assert "bnkern.norm.api" in loaded
    assert not {"bnkern._native", "bnkern.backends.triton", "bnkern.backends.cpu", "triton"} & set(loaded)


WITHOUT_NATIVE = "import sys; sys.modules['bnkern._native'] = None\n"  # importing it now raises ImportError


def test_without_the_native_module_the_reference_serves_with_a_warning():
    output = python(
        WITHOUT_NATIVE + "import torch, warnings, bnkern\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    y = bnkern.batch_norm(torch.randn(8, 3, 2, 2), None, None, training=True)\n"
        "print(y.std().item(), *(w.message for w in caught))"
    )
    assert abs(float(output.split()[0]) - 1) < 0.1
    assert "reference" in output


def test_report_of_versions_devices_and_backends():
    report = json.loads(
        python("import runpy, sys; sys.argv[1:] = ['--json']; runpy.run_module('bnkern', None, '__main__')")
    )
    assert report["versions"]["torch"] == torch.__version__
    assert "cpu" in report["devices"]
    assert set(report["backends"]) == {"cuda", "triton", "cpu", "reference"}
    assert "cpu" in report["backends"]["reference"]
    assert all(text.startswith(("works on ", "no: ")) for text in report["backends"].values())
    if not torch.cuda.is_available():
        assert report["backends"]["cuda"].startswith("no: ")


def test_report_without_the_native_module_says_how_to_build_it():
    text = python(WITHOUT_NATIVE + "import runpy; sys.argv[1:] = []; runpy.run_module('bnkern', None, '__main__')")
    assert re.search(r"native module\n  module +not found .*pip install -e \.", text)


# ---- the set-up files


def test_make_alone_lists_every_target():
    text = binutil("make", "-C", str(ROOT), "--no-print-directory")
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"setup", "reproduce", "test", "test-all", "test-floor", "bench", "lint", "gpu-check"} <= set(targets)
    assert re.findall(r"^  make ([a-z-]+) +\w", text, re.MULTILINE) == targets


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = sum(project["optional-dependencies"].values(), project["dependencies"])
    names = {re.match(r"[\w-]+", line)[0] for line in requirements} - {"bnkern"}
    names |= set(re.findall(r"--no-deps ([\w-]+)", (ROOT / "Makefile").read_text()))
    pins = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert names == set(pins)


def configured(tmp_path: Path, **settings: object) -> subprocess.CompletedProcess:
    header = tmp_path / "include" / "pybind11" / "pybind11.h"  # searched for, but read only after the architectures
    header.parent.mkdir(parents=True, exist_ok=True)
    header.touch()
    options = {"BNKERN_PYBIND11_INCLUDE": header.parents[1], "Python_EXECUTABLE": sys.executable} | settings
    defines = [f"-D{name}={value}" for name, value in options.items()]
    command = ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", *defines]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(not all(map(shutil.which, ("cmake", "ninja", "nvcc"))), reason="cmake, ninja or nvcc is missing")
def test_architectures_are_named_one_by_one(tmp_path):
    """build_info() would repeat names of groups, and the module could not tell which GPUs it serves."""
    process = configured(tmp_path, BNKERN_CUDA=1, BNKERN_CUDA_ARCHS="80-real;all-major")
    assert process.returncode != 0
    assert "all-major is not an architecture" in " ".join(process.stderr.split()), process.stderr


@pytest.mark.skipif(not all(map(shutil.which, ("cmake", "ninja"))), reason="cmake or ninja is missing")
def test_instruction_sets_of_the_cpu_kernels_can_be_chosen(tmp_path):
    process = configured(tmp_path, BNKERN_CUDA=0, BNKERN_CPU_ISAS="generic")
    assert process.returncode == 0, process.stderr
    commands = (tmp_path / "build" / "compile_commands.json").read_text()
    assert "cpu_generic" in commands and "cpu_avx" not in commands and "BNKERN_HAS_AVX" not in commands
    process = configured(tmp_path, BNKERN_CUDA=0, BNKERN_CPU_ISAS="generic;sse9")
    assert process.returncode != 0
    assert "sse9 is none of generic" in " ".join(process.stderr.split()), process.stderr


def source_archive(folder: Path) -> Path:
    """The archive that a build front end makes of this tree. It is made of a copy, since setuptools writes into it."""
    tree = folder / "tree"
    left_out = (".*", "build", "results", "published", "run", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*left_out))
    make_sdist = [sys.executable, "-c", "import setuptools.build_meta as m; m.build_sdist('dist')"]
    subprocess.run(make_sdist, cwd=tree, check=True)
    (sdist,) = tree.glob("dist/*.tar.gz")
    return sdist


def test_source_archive_holds_what_a_build_reads_and_no_part_of_the_tests(tmp_path):
    with tarfile.open(source_archive(tmp_path)) as archive:
        packed = {member.name.partition("/")[2] for member in archive if member.isfile()}
    needed = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.is_file()}
    needed |= {
        str(path.relative_to(ROOT)) for pattern in ("*.py", "*.pyi") for path in ROOT.glob(f"bnkern/**/{pattern}")
    }
    needed |= {"setup.py", "pyproject.toml", "CMakeLists.txt", "constraints.txt", "README.md", "LICENSE"}
    needed |= {
        "bnkern/py.typed",
        "bnkern/backends/cuda_rules.json",
        "CHANGELOG.md",
        "CITATION.cff",
        "docs/design.md",
        "examples/fused_block.py",
    }
    assert not needed - packed
    assert {name for name in packed if name.startswith("tests/")} == {"tests/installed.py"}
    assert not [name for name in packed if name.startswith(("benchmarks/", "experiments/", "build/")) or ".so" in name]


def test_wheels_of_a_release():
    """cibuildwheel accepts the configuration. It is not run, because it needs containers."""
    for package in ("cibuildwheel", "validate_pyproject"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    listed = [sys.executable, "-m", "cibuildwheel", "--platform", "linux", "--print-build-identifiers", str(ROOT)]
    identifiers = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()
    assert identifiers == [f"cp3{minor}-manylinux_x86_64" for minor in (11, 12, 13)]
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    assert configuration["linux"]["environment"] == {"BNKERN_CUDA": "0"}
    assert "--exclude libgomp.so.1" in configuration["linux"]["repair-wheel-command"]
    scripts = re.findall(r"\{project\}/(\S+)", configuration["test-command"])
    assert scripts and all((ROOT / script).is_file() for script in scripts)
    matrix = re.search(r"python: \[(.*)\]", (ROOT / ".github/workflows/release.yml").read_text())[1].split(", ")
    assert [f"{python}-*" for python in matrix] == configuration["build"].split()
    checked = subprocess.run(
        [sys.executable, "-m", "validate_pyproject", str(ROOT / "pyproject.toml")], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout


def test_the_check_of_an_installed_package_passes_here():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", str(ROOT / "tests" / "installed.py")]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert output.count("largest difference") == 2 * 7


@pytest.mark.slow
def test_source_archive_builds_for_every_architecture(tmp_path):
    """sdist -> wheel -> use, away from this tree, and for all CUDA architectures where there is a compiler."""
    sdist = source_archive(tmp_path)
    pip, archs = [sys.executable, "-m", "pip"], "80-real;90-real;100-real;120"
    env = os.environ | {"BNKERN_CUDA_ARCHS": archs}
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, sdist], env=env, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    show = "from bnkern import _native; print(_native.__file__, *_native.build_info()['cuda_archs'])"
    env = os.environ | {"PYTHONPATH": str(site)}
    path, *built = subprocess.check_output([sys.executable, "-c", show], cwd=tmp_path, env=env, text=True).split()
    assert Path(path).is_relative_to(site)
    assert (site / "bnkern" / "py.typed").exists()
    subprocess.run([sys.executable, "-P", ROOT / "tests" / "installed.py"], cwd=tmp_path, env=env, check=True)
    assert built == (archs.split(";") if native.build_info()["cuda"] else [])
