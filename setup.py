"""Builds thyme._native (C++17, pybind11) with CMake and Ninja; everything else is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        tree = Path(self.build_temp).resolve() / "cmake"
        tree.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", ROOT, "-B", tree, "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        # pip installs cmake and ninja beside the interpreter; a venv that is not activated lacks them on PATH.
        env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        subprocess.check_call(configure, env=env)
        subprocess.check_call(["cmake", "--build", tree, "--target", ext.name.rsplit(".", 1)[-1]], env=env)


PACKAGES = ["thyme", "thyme.kernels"] + [
    f"thyme.{part}"
    for part in ("model", "engine", "sandbox", "rollout", "rewards", "data", "train", "evals", "demo", "recipes")
]

setup(
    packages=PACKAGES,
    package_data={"thyme": ["*.pyi"], "thyme.recipes": ["*.toml"]},
    ext_modules=[Extension("thyme._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
