"""What the doctor finds of Python, torch, Triton, GPU, driver and packages. Packages are imported, in a process of
their own: one that is installed may still lack a library, and one that dies takes nobody with it."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from thyme.verbs.doctor_check import Check

EXTRAS = {
    "serve": ("starlette", "uvicorn"),
    "judge": ("openai",),
    "data": ("pyarrow",),
    "eval": ("math_verify", "openpyxl"),
    "evidence": ("rapidocr_onnxruntime", "cv2"),
    "view": ("starlette", "uvicorn"),
    "ray": ("ray",),
    "real": ("gguf", "accelerate"),
    "bench": ("liger_kernel", "cut_cross_entropy", "flashinfer", "trl", "datasets"),
    "track": ("tensorboard", "trackio", "wandb"),
    "train": ("torchao",),
    "demo": ("sklearn", "skimage", "cv2"),
    "sandbox": ("cv2", "matplotlib", "scipy", "skimage", "pandas", "sympy"),
    "gpu": ("flash_attn",),
}
"""Extra of pyproject.toml -> modules it brings."""
_ON_A_GPU = {"gpu", "bench"}
_OLDEST = (3, 11)
_IMPORT_S = 180.0
_MARK = "imported: "
_IMPORTS = f"""
import contextlib, importlib, sys
for module in sys.argv[1:]:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            importlib.import_module(module)
        error = ""
    except BaseException as failure:
        error = " ".join(f"{{type(failure).__name__}}: {{failure}}".split())[:200]
    print(f"\\n{_MARK}{{module}} {{error}}", flush=True)
"""


def machine_checks() -> list[Check]:
    """Interpreter, processor, and what torch can compute with."""
    return [_python(), _cores(), *_torch(), _triton(), _native(), *_gpus()]


def package_checks() -> list[Check]:
    """Each extra, and the command that installs what it lacks."""
    extras = {name: modules for name, modules in EXTRAS.items() if name not in _ON_A_GPU or _sees_gpu()}
    wanted = sorted({module for modules in extras.values() for module in modules})
    installed = [module for module in wanted if importlib.util.find_spec(module) is not None]
    broken = import_errors(installed)
    found = []
    for extra, modules in extras.items():
        missing = [module for module in modules if module not in installed]
        failing = [f"{module} cannot be imported: {broken[module]}" for module in modules if module in broken]
        said = "; ".join([f"missing: {', '.join(missing)}"] * bool(missing) + failing) or ", ".join(modules)
        ok = not missing and not failing
        mend = "" if ok else f"pip install {'--force-reinstall ' * bool(failing)}'thyme[{extra}]'"
        found.append(Check(part="packages", name=extra, ok=ok, needed=False, found=said, remedy=mend))
    return found


def import_errors(modules: Sequence[str]) -> dict[str, str]:
    """Of installed modules those whose import fails, and how."""
    errors: dict[str, str] = {}
    left = list(modules)
    while left:
        said, end = _imported(left)
        errors |= {module: error for module, error in said.items() if error}
        left = [module for module in left if module not in said]
        if left:  # the process did not get beyond this one
            errors[left.pop(0)] = end
    return errors


def _imported(modules: Sequence[str]) -> tuple[dict[str, str], str]:
    """How far a process of its own got: by module the error, "" where there is none; and how the process ended."""
    command = [sys.executable, "-c", _IMPORTS, *modules]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_S, check=False)
        printed, end = done.stdout, f"its process ended with {done.returncode}"
    except subprocess.TimeoutExpired as error:
        told = error.stdout or b""
        printed = told.decode(errors="replace") if isinstance(told, bytes) else told
        end = f"no end within {_IMPORT_S:g} s"
    said = (line.removeprefix(_MARK).partition(" ") for line in printed.splitlines() if line.startswith(_MARK))
    return {module: error for module, _, error in said}, end


def _python() -> Check:
    ok = sys.version_info[:2] >= _OLDEST
    wanted = ".".join(map(str, _OLDEST))
    return Check(
        part="machine",
        name="Python",
        ok=ok,
        needed=True,
        found=f"{platform.python_version()} on {platform.system()} {platform.release()}, {platform.machine()}",
        remedy="" if ok else f"install Python {wanted} or later, and make a new environment with it",
    )


def _cores() -> Check:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return Check(
        part="machine", name="cores", ok=True, needed=False, found=f"{cores} cores, {memory:.1f} GiB of memory"
    )


def _torch() -> list[Check]:
    version = _version("torch")
    if version is None:
        return [_missing("torch", "pip install torch==2.13.0")]
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    ok = bool(torch.version.cuda) or not _sees_gpu()
    mend = "" if ok else "pip install --force-reinstall torch, from the index of your CUDA version (pytorch.org)"
    return [Check(part="machine", name="torch", ok=ok, needed=False, found=f"{version}, {built}", remedy=mend)]


def _triton() -> Check:
    version = _version("triton")
    if version is None:
        return _missing("Triton", "pip install triton==3.6.0")
    return Check(part="machine", name="Triton", ok=True, needed=True, found=version)


def _native() -> Check:
    try:
        native = importlib.import_module("thyme._native")
    except ImportError as error:
        return Check(
            part="machine",
            name="C++ extension",
            ok=False,
            needed=True,
            found=str(error),
            remedy="pip install -e . in the checkout (it compiles csrc/), or pip install --force-reinstall thyme",
        )
    return Check(part="machine", name="C++ extension", ok=True, needed=True, found=Path(str(native.__file__)).name)


def _gpus() -> list[Check]:
    if not _sees_gpu():
        return [Check(part="machine", name="GPU", ok=True, needed=False, found="none: everything runs on the CPU")]
    driver = _driver()
    if _version("torch") is None:
        return []
    import torch

    if not torch.cuda.is_available():
        mend = "update the driver to one that knows torch's CUDA, or install a torch of the driver's CUDA"
        found = f"there is one, which torch cannot use; driver {driver}"
        return [Check(part="machine", name="GPU", ok=False, needed=False, found=found, remedy=mend)]
    checks = []
    for index in range(torch.cuda.device_count()):
        known = torch.cuda.get_device_properties(index)
        free, _ = torch.cuda.mem_get_info(index)
        ok = (known.major, known.minor) >= (8, 0)
        checks.append(
            Check(
                part="machine",
                name=f"GPU {index}",
                ok=ok,
                needed=False,
                found=f"{known.name}, sm_{known.major}{known.minor}, {free / 2**30:.1f} of "
                f"{known.total_memory / 2**30:.1f} GiB free, driver {driver}",
                remedy="" if ok else "kernels are written for sm_80 and later: CUDA_VISIBLE_DEVICES= uses the CPU",
            )
        )
    return checks


def _sees_gpu() -> bool:
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown (nvidia-smi does not answer)"
    return done.stdout.split("\n")[0].strip() or "unknown"


def _missing(name: str, command: str) -> Check:
    return Check(part="machine", name=name, ok=False, needed=True, found="not installed", remedy=command)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
