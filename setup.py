"""Build the native module with CMake. Everything else is in pyproject.toml. The build does not need torch.

It reads BNKERN_CUDA, BNKERN_CUDA_ARCHS, BNKERN_CPU_ISAS (see CMakeLists.txt) and MAX_JOBS from the environment.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import pybind11  # not at the top: a source archive can be made without pybind11

        # A fixed build folder, so that a second build compiles only what has changed. The pybind11 of an isolated
        # build has a new path each time, so its headers are copied to a fixed one. Otherwise bind.cpp would be
        # compiled in every build.
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        headers = build / f"pybind11-{pybind11.__version__}"
        if not headers.exists():
            shutil.copytree(pybind11.get_include(), headers)
        options = {
            "Python_EXECUTABLE": sys.executable,
            "BNKERN_PYBIND11_INCLUDE": headers,
            "BNKERN_OUTPUT_DIR": build,
            "BNKERN_CUDA": os.environ.get("BNKERN_CUDA", ""),
            "BNKERN_CUDA_ARCHS": os.environ.get("BNKERN_CUDA_ARCHS", ""),
            "BNKERN_CPU_ISAS": os.environ.get("BNKERN_CPU_ISAS", ""),
        }
        if ninja := shutil.which("ninja"):
            options["CMAKE_MAKE_PROGRAM"] = ninja
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        defines = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *defines], check=True)
        subprocess.run(["cmake", "--build", build, "--parallel", jobs], check=True)
        module = Path(self.get_ext_fullpath(ext.name))
        module.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(build / module.name, module)


setup(
    ext_modules=[Extension("bnkern._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
