"""Builds thyme._native (C++17, pybind11) with CMake and Ninja; everything else is in pyproject.toml."""

import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        tree = Path(self.build_temp).resolve() / "cmake"
        tree.mkdir(parents=True, exist_ok=True)
        definitions = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": out,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        options = [f"-D{name}={value}" for name, value in definitions.items()]
        # pip installs cmake and ninja beside the interpreter; a venv that is not activated lacks them on PATH.
        env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        subprocess.check_call(["cmake", "-S", ROOT, "-B", tree, "-G", "Ninja", *options], env=env)
        subprocess.check_call(["cmake", "--build", tree, "--target", ext.name.rsplit(".", 1)[-1]], env=env)


def link_kernels() -> None:
    """Makes thyme/kernels a link to ../kernels again where an unpacker, or a copy, made something else of it.

    The files lie in kernels/ and are imported as thyme.kernels. A zip archive opened by a tool that knows no links
    leaves a text file of the link's target, a source distribution leaves it out, a copy that follows links leaves a
    second folder. What holds nothing of its own is replaced; anything else is the reader's to decide.
    """
    files, link = ROOT / "kernels", ROOT / "thyme" / "kernels"
    if not files.is_dir():
        raise SystemExit(f"setup.py: {files} is missing: unpack the whole archive, or check the repository out again")
    if link.is_symlink() and link.exists() and link.samefile(files):
        return
    if link.is_symlink():
        found = f"a link to {link.readlink()}"
    elif not link.exists():
        found = "missing"
    elif link.is_file() and link.read_bytes().strip() in (b"../kernels", b""):
        found = "the text of a link"
    elif link.is_dir() and not _differences(link, files):
        found = "a copy"
    else:
        what = f"differs from {files} in {', '.join(_differences(link, files))}" if link.is_dir() else "is no link"
        raise SystemExit(f"setup.py: {link} {what}: move what you need to kernels/, remove thyme/kernels, run again")
    new = link.with_name(".kernels-new")
    new.unlink(missing_ok=True)
    try:
        new.symlink_to("../kernels")
        now = "it is a link to ../kernels again"
    except OSError as error:
        shutil.copytree(files, new)
        now = f"it is a copy of kernels/ now, as no link can be made here: {error}"
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    else:
        link.unlink(missing_ok=True)
    new.replace(link)
    print(f"setup.py: thyme/kernels was {found}; {now}")


def _differences(one: Path, other: Path) -> list[str]:
    """Paths of the files that the folders do not share byte for byte, caches aside."""
    found = {path.relative_to(folder) for folder in (one, other) for path in folder.rglob("*") if path.is_file()}
    names = sorted(str(path) for path in found if "__pycache__" not in path.parts)
    _, mismatch, errors = filecmp.cmpfiles(one, other, names, shallow=False)
    return sorted({*mismatch, *errors})


link_kernels()
setup(
    # kernels/ has no __init__.py: a folder named `kernels` in the current directory must never hide the package of
    # that name which transformers imports.
    packages=[*find_packages(include=["thyme", "thyme.*"]), "thyme.kernels"],
    include_package_data=True,
    ext_modules=[Extension("thyme._native", sources=[]), Extension("thyme._fork", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
