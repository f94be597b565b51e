"""What snippets may import. All of it is loaded in the fork-server, once: mapping executable memory is denied to a
snippet, so a compiled module that is not there by then never will be.

Every shared library costs five mappings, and each mapping about two microseconds in the life of each child (copied by
fork, taken down at exit). So what no snippet has a use for stays out: databases, TLS, XML, foreign encodings.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import sys
from pathlib import Path

# hashlib and hmac fall back to the modules of each digest, uuid to random numbers: OpenSSL and libuuid are not needed.
_COMPILED = (
    "_bisect _blake2 _contextvars _csv _ctypes _datetime _decimal _heapq _json _md5 _opcode _pickle _posixsubprocess "
    "_queue _random _sha1 _sha2 _sha256 _sha3 _sha512 _socket _statistics _struct _typing array binascii cmath fcntl "
    "grp math mmap resource select unicodedata zlib"
)
_PLAIN = (
    "ast base64 bisect cmath collections colorsys copy csv dataclasses datetime decimal difflib enum fractions "
    "functools glob hashlib heapq html imghdr io itertools json locale math operator os pathlib pickle pprint queue "
    "random re secrets shutil statistics string struct tempfile textwrap threading time timeit traceback typing "
    "unicodedata uuid zipfile zlib encodings.idna encodings.latin_1 encodings.ascii encodings.utf_16 encodings.cp437"
)
_NUMPY = "linalg fft random ma lib.stride_tricks polynomial"
_PILLOW = (
    "Image ImageChops ImageColor ImageDraw ImageEnhance ImageFilter ImageFont ImageMath ImageMorph ImageOps ImageStat "
    "ImageSequence ImageCms ImageTransform ImagePalette ImageFile JpegImagePlugin PngImagePlugin features"
)
_PARTS = {
    "matplotlib": "pyplot patches image font_manager mathtext backends.backend_agg",
    "scipy": "fft integrate interpolate linalg ndimage optimize signal sparse spatial special stats",
    "skimage": "color draw exposure feature filters io measure metrics morphology restoration segmentation transform",
}
"""Modules that come with a package when it is named, as importing it alone does not load them."""
_EXTRAS = ("/usr/share/fonts", "/usr/share/zoneinfo", "/usr/local/share/fonts")


def preload(extra: list[str]) -> list[str]:
    """Imports all a snippet may use. Returns what of `extra` is missing."""
    compiled = _COMPILED.split()
    libraries = [p for p in sys.path if p.endswith("lib-dynload")]
    left_out = [info.name for info in pkgutil.iter_modules(libraries) if info.name not in compiled]
    _bar(left_out)
    pillow = [f"PIL.{name}" for name in _PILLOW.split()]
    for name in (*compiled, *_PLAIN.split(), *pillow):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for name in ("numpy", *(f"numpy.{name}" for name in _NUMPY.split())):
        importlib.import_module(name)
    importlib.import_module("PIL.Image").init()
    vars(importlib.import_module("PIL.AvifImagePlugin"))["DEFAULT_MAX_THREADS"] = 1  # a snippet may not start threads
    with contextlib.suppress(ImportError):
        importlib.import_module("cv2")
    for name in left_out:  # what the user adds may load whatever it needs
        if sys.modules[name] is None:
            del sys.modules[name]
    _add_builtins_of_site()
    missing = []
    for name in extra:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
            continue
        for part in _PARTS.get(name, "").split():
            with contextlib.suppress(ImportError):
                importlib.import_module(f"{name}.{part}")
        if name == "matplotlib":
            with contextlib.suppress(ImportError):
                importlib.import_module("mpl_toolkits.mplot3d")
    os.environ.pop("MPLCONFIGDIR", None)  # a folder of the host, which matplotlib has read by now
    _bar(left_out)
    return missing


def _add_builtins_of_site() -> None:
    """`exit`, `quit`, `copyright`, `credits`, `license`, `help`: the fork-server starts without `site`, whose paths
    and hooks are not wanted here."""
    site = importlib.import_module("site")
    for add in (site.setquit, site.setcopyright, site.sethelper):
        add()


def _bar(names: list[str]) -> None:
    """Importing what is not there yet fails at once and in words, not when its code is mapped."""
    for name in names:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def is_left_out(name: str | None) -> bool:
    """Whether a module is there on the host but kept from snippets."""
    return name in sys.modules and sys.modules[name] is None


def readable_paths() -> list[Path]:
    """The standard library, the packages that are loaded, fonts and time zones."""
    stdlib = Path(os.__file__).resolve().parent
    found = {stdlib}
    for module in list(sys.modules.values()):
        name, file = getattr(module, "__name__", ""), getattr(module, "__file__", None)
        if not file or name.split(".")[0] in ("thyme", "__main__"):
            continue
        path = Path(file).resolve()
        if stdlib in path.parents:
            continue
        top = name.split(".")[0]
        package = next((p for p in path.parents if p.name == top), None)
        found.add(package if package is not None else path)
        libs = (package.parent if package is not None else path.parent) / f"{top}.libs"
        if libs.is_dir():
            found.add(libs)
    found |= {Path(p) for p in _EXTRAS if Path(p).is_dir()}
    return sorted(p for p in found if not any(q in found for q in p.parents))


def anybody_may_read(path: Path) -> bool:
    """Whether another user id gets to `path` by its permissions."""
    return path.stat().st_mode & 0o4 != 0 and all(p.stat().st_mode & 0o1 for p in path.parents)
