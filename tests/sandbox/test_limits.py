"""Every limit of a sandbox from outside, at its edge and one past it, beside the defaults of all others; limits that
contradict each other; photographs as people bring them."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from thyme.sandbox import Sandbox, SandboxConfig, SandboxResult, Status
from thyme.sandbox import config as limits

MIB = 1 << 20
PATIENT: dict[str, Any] = {"workers": 1, "timeout_s": 120.0}
"""Where time is not what is tried: the machine may be busy."""


class Edge(NamedTuple):
    """A limit, code that just keeps it, code that goes one past it, and how that ends."""

    limit: str
    kept: str
    past: str
    status: Status
    words: str
    """Of the error, or of what was printed."""
    set_to: Any = None
    """None: the default."""


SAVE = "from PIL import Image\nfor i, size in enumerate({}): Image.new('RGB', size).save(f'{{i}}.jpg')"
PRIVATE = "import mmap\nx = mmap.mmap(-1, {}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)"
EDGES = [
    Edge(
        "max_pixels",
        SAVE.format("[(8192, 8192)]"),
        SAVE.format("[(4096, 4096)] * 4 + [(1, 1)]"),
        Status.OUTPUT_LIMIT,
        "over the limit of 67108864 pixels",
    ),
    Edge("max_pixels", SAVE.format("[(50, 40)]"), SAVE.format("[(50, 41)]"), Status.OUTPUT_LIMIT, "2000 pixels", 2000),
    Edge("max_images", SAVE.format("[(2, 2)] * 8"), SAVE.format("[(2, 2)] * 9"), Status.OUTPUT_LIMIT, "more than 8"),
    Edge(
        "max_images",
        SAVE.format("[(2, 2)] * 256"),
        SAVE.format("[(2, 2)] * 256 + [(3, 3)]"),
        Status.OUTPUT_LIMIT,
        "",
        256,
    ),
    Edge(
        "max_aspect", SAVE.format("[(800, 4)]"), SAVE.format("[(801, 4)]"), Status.OUTPUT_LIMIT, "more than 200 times"
    ),
    Edge(
        "scratch_mib",
        f"open('a', 'wb', 0).write(bytes({192 * MIB}))",
        f"open('a', 'wb', 0).write(bytes({192 * MIB}))\nopen('b', 'wb', 0).write(b'x')",
        Status.OUTPUT_LIMIT,
        "at most 192 MiB",
    ),
    Edge(
        "max_files",
        "for i in range(256): open(str(i), 'w').close()",
        "for i in range(257): open(str(i), 'w').close()",
        Status.OUTPUT_LIMIT,
        "256 files and folders",
    ),
    Edge("max_stdout_bytes", "print('x' * 65535)", "print('x' * 65536)", Status.OK, "[output cut here]"),
    Edge(
        "max_stdout_bytes", f"print('x' * {20 * MIB - 1})", f"print('x' * {20 * MIB})", Status.OK, "[output", 20 * MIB
    ),
    Edge("max_error_bytes", "raise ValueError('e' * 2048)", "raise ValueError('e' * 2049)", Status.ERROR, "e" * 2048),
    Edge(
        "max_error_bytes",
        "raise ValueError('\\1' * 8192)",
        "raise ValueError('\\1' * 8193)",
        Status.ERROR,
        "\1" * 8192,
        8192,
    ),
    Edge(
        "max_code_bytes", "x = 1#" + "-" * (131072 - 6), "x = 1#" + "-" * (131072 - 5), Status.REFUSED, "131073 bytes"
    ),
    Edge(
        "memory_mib",
        "import numpy\nx = numpy.zeros(2000 << 20, 'u1')",
        "import numpy\nx = numpy.zeros(2100 << 20, 'u1')",
        Status.MEMORY,
        "more than 2048 MiB",
        2048,
    ),
    Edge(  # to the page, less what the interpreter itself may take meanwhile: it asks for 1 MiB at a time
        "memory_mib",
        PRIVATE.format("2047 << 20"),
        PRIVATE.format("(2048 << 20) + 1"),
        Status.ERROR,
        "Cannot allocate memory",
        2048,
    ),
    Edge("timeout_s", "import time; time.sleep(.1)", "import time; time.sleep(60)", Status.TIMEOUT, "than 3 s", 3.0),
    Edge(
        "session_timeouts",
        "import resource; print(resource.getrlimit(resource.RLIMIT_CPU)[0])",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 2))\nwhile True: pass",
        Status.TIMEOUT,
        "CPU time",
        2,
    ),
]


def run(code: str, **config: Any) -> SandboxResult:
    with Sandbox(SandboxConfig(**PATIENT | config)) as sandbox:
        return sandbox.run(code)


def is_kept_by(edge: Edge, result: SandboxResult) -> bool:
    """Whether nothing was lost."""
    if edge.limit == "max_error_bytes":
        return result.error is not None and len(result.error.message.encode()) == int(edge.words.count(edge.words[0]))
    if edge.limit == "max_stdout_bytes":
        return (
            result.status is Status.OK
            and len(result.stdout) == int(edge.set_to or 65536)
            and "cut" not in result.stdout
        )
    return result.status is Status.OK


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: f"{edge.limit}={edge.set_to or 'default'}")
def test_a_limit_is_reached_and_one_past_it_ends_as_documented(edge: Edge) -> None:
    config = {} if edge.set_to is None else {edge.limit: edge.set_to}
    if edge.limit == "max_images" and edge.set_to:
        config["max_files"] = 1000
    with Sandbox(SandboxConfig(**PATIENT | config)) as sandbox:
        if edge.limit in ("scratch_mib", "max_files") and sandbox.isolation != "full":
            pytest.skip("without a file system of its own the scratch is looked at every 20 ms")
        kept, past = sandbox.run(edge.kept), sandbox.run(edge.past)
    assert is_kept_by(edge, kept), (kept.status, kept.error)
    if edge.limit in ("max_pixels", "max_images", "max_aspect"):
        assert len(kept.images) == len(eval(edge.kept.split("enumerate(")[1].split("): Image")[0]))
    assert past.status is edge.status, past.error
    said = past.error.message if past.error is not None and edge.status is not Status.OK else past.stdout
    assert edge.words in said


def test_limits_beyond_what_the_kernel_counts_are_none() -> None:
    assert run("print(1)", timeout_s=1e300, session_timeouts=1 << 60, idle_s=1e300).stdout == "1\n"


def test_idle_workers_and_sessions_are_bounded_at_their_number() -> None:
    config = SandboxConfig(workers=1, memory_mib=256, max_sessions=2, timeout_s=60.0)
    with Sandbox(config) as sandbox:
        first, second, third = (sandbox.session() for _ in range(3))
        assert [session.run("print(1)").stdout for session in (first, second)] == ["1\n"] * 2
        waiting = sandbox._client.submit(third._state, "print(3)")
        assert not waiting.future.done()
        first.close()
        assert waiting.future.result(30).stdout == "3\n"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_pixels": 1 << 28, "memory_mib": 1024}, ("max_pixels=268435456", "memory_mib=1024", "lower max_pixels")),
        ({"max_images": 20, "max_files": 10}, ("max_images=20", "max_files=10", "raise max_files")),
        ({"max_images": 257, "max_files": 1000}, ("max_images", "at most 256")),
        ({"workers": 2, "memory_mib": 1 << 22, "max_pixels": 1}, ("workers=2", "memory_mib=4194304", "lower workers")),
        ({"workers": 1, "memory_mib": 64, "max_pixels": 1, "scratch_mib": 1 << 30}, ("scratch_mib", "half of the")),
        ({"workers": 1, "max_sessions": 4000}, ("max_sessions=4000", "workers=1", "4000 processes")),
        ({"max_aspect": 0.5}, ("max_aspect", "at least 1")),
        ({"timeout_s": float("inf")}, ("timeout_s", "finite")),
        ({"idle_s": float("nan")}, ("idle_s", "number")),
        ({"memory_mib": 0.5}, ("memory_mib", "whole number")),
        ({"max_files": True}, ("max_files", "whole number")),
        ({"max_stdout_bytes": 255}, ("max_stdout_bytes must be >= 256",)),
        ({"max_error_bytes": 8193}, ("max_error_bytes <= 8192",)),
        ({"timeout_s": "5"}, ("timeout_s", "must be a number")),
        ({"preload": "scipy"}, ("preload", "'scipy'", "as a list")),
        ({"preload": ("matplotlib,scipy",)}, ("'matplotlib,scipy'", "--sandbox.preload matplotlib scipy")),
    ],
)
def test_limits_that_contradict_each_other_are_refused_by_name(fields: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        SandboxConfig(**fields)
    assert all(word in str(error.value) for word in words), error.value


def test_more_sessions_than_descriptors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_most_descriptors", lambda: 1024)
    assert SandboxConfig().max_sessions == 128
    with pytest.raises(ValueError, match=r"max_sessions=250 .* 1024: lower max_sessions or raise `ulimit -n`"):
        SandboxConfig(workers=1, max_sessions=250)


@pytest.mark.parametrize("mib", [1500, 2048, 3700, 4096, 8192, 65536])
@pytest.mark.parametrize("cores", [1, 2, 64])
def test_the_defaults_hold_on_any_machine(mib: int, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "available_memory_mib", lambda: mib)
    monkeypatch.setattr(limits, "_most_descriptors", lambda: 1024)
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda _: set(range(cores)))
    config = SandboxConfig()
    assert 1 <= config.workers <= 2 * cores and config.workers * config.worker_mib <= mib // 2
    if mib >= 3700:
        assert config.memory_mib >= 1400 and config.max_pixels == 64 << 20  # a photograph of 50 megapixels
    for given in ({"workers": 1}, {"memory_mib": 256}, {"max_pixels": 1 << 20}):
        given_one = SandboxConfig(**given)
        assert all(getattr(given_one, name) == value for name, value in given.items())


# --- results ---------------------------------------------------------------------------------------------------------


def test_pixels_are_exact_beyond_the_size_of_any_piece() -> None:
    """Also where a row is longer than a piece, and where images of several sizes follow each other."""
    code = (
        "import numpy as np\nfrom PIL import Image\n"
        "for i, (w, h) in enumerate([(3000, 2001), (100000, 20), (1, 1), (7, 1000)]):\n"
        "    Image.fromarray(np.random.default_rng(i).integers(0, 256, (h, w, 3), dtype=np.uint8)).save(f'{i}.png')"
    )
    result = run(code, max_aspect=5000.0)
    assert result.status is Status.OK, result.error
    for i, image in enumerate(result.images):
        width, height = image.size
        expected = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        assert np.array_equal(np.asarray(image), expected)
    assert len(result.images) == 4


def test_a_picture_larger_than_pillow_opens_is_a_limit_like_any_other() -> None:
    result = run("from PIL import Image\nImage.new('1', (20000, 20000)).save('a.png')")
    assert result.status is Status.OUTPUT_LIMIT, result
    assert result.error is not None and "a.png (20000x20000) is over the limit" in result.error.message


# --- photographs -----------------------------------------------------------------------------------------------------

OPERATIONS = {
    "rotate": (
        "Image.open(image_path).rotate(90, expand=True).save('o.{}')",
        "cv2.imwrite('o.{}', cv2.rotate(cv2.imread(image_path), cv2.ROTATE_90_CLOCKWISE))",
    ),
    "contrast": (
        "from PIL import ImageEnhance\nImageEnhance.Contrast(Image.open(image_path)).enhance(1.5).save('o.{}')",
        "cv2.imwrite('o.{}', cv2.convertScaleAbs(cv2.imread(image_path), alpha=1.5, beta=-20))",
    ),
    "resize": (
        "im = Image.open(image_path)\nim.resize((im.width // 2, im.height // 2)).save('o.{}')",
        "cv2.imwrite('o.{}', cv2.resize(cv2.imread(image_path), None, fx=.5, fy=.5))",
    ),
    "arithmetic": (
        "a = np.array(Image.open(image_path))\n"
        "Image.fromarray(np.clip(a.astype(np.float32) * 1.5 - 20, 0, 255).astype(np.uint8)).save('o.{}')",
    ),
}


def photograph(width: int, height: int, path: Path, format: str) -> Path:
    """Smooth, with the noise of a camera."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width].astype(np.int32)
    base = [columns * 200 // width, rows * 200 // height, (rows + columns) * 200 // (width + height)]
    pixels = np.stack([b.astype(np.uint8) for b in base], axis=-1)
    pixels += rng.integers(0, 30, pixels.shape, dtype=np.uint8)
    options: dict[str, Any] = {"compress_level": 1} if format == "PNG" else {"quality": 92}
    Image.fromarray(pixels).save(path, format, **options)
    return path


def check_photographs(width: int, height: int, format: str, folder: Path, operations: list[str], to: str) -> None:
    source = photograph(width, height, folder / "photo", format)
    with Sandbox(SandboxConfig(workers=1, timeout_s=300.0)) as sandbox:
        for name in operations:
            for code in OPERATIONS[name]:
                result = sandbox.run(
                    "import cv2\nimport numpy as np\nfrom PIL import Image\n" + code.format(to), source
                )
                assert result.status is Status.OK, (name, code, result.error)
                turned = {"rotate": (height, width), "resize": (width // 2, height // 2)}
                assert [image.size for image in result.images] == [turned.get(name, (width, height))], (name, code)


def test_photographs_of_twelve_megapixels(tmp_path: Path) -> None:
    pytest.importorskip("cv2", reason="OpenCV is in the extra 'demo'")
    check_photographs(4032, 3024, "JPEG", tmp_path, ["rotate", "arithmetic"], "jpg")
    check_photographs(4032, 3024, "PNG", tmp_path, ["resize"], "png")
    assert 20 * MIB < (tmp_path / "photo").stat().st_size < 36 * MIB


@pytest.mark.soak
@pytest.mark.parametrize("to", ["jpg", "png"])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_photographs_of_fifty_megapixels(format: str, to: str, tmp_path: Path) -> None:
    pytest.importorskip("cv2", reason="OpenCV is in the extra 'demo'")
    check_photographs(8160, 6120, format, tmp_path, list(OPERATIONS), to)


def test_a_large_picture_is_compressed_where_there_is_no_room_for_it_as_it_is() -> None:
    code = "from PIL import Image\nimport os\nImage.new('RGB', (3000, 3000)).save('a.png')\n"
    code += "print(os.path.getsize('a.png'))"
    assert int(run(code).stdout) > 3000 * 3000 * 3 > 100 * int(run(code, scratch_mib=16).stdout)


# --- the input -------------------------------------------------------------------------------------------------------


def detailed(image: Image.Image, format: str, orientation: int | None = None) -> bytes:
    """A file with an EXIF block, a resolution and a profile."""
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    if orientation is not None:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, format, exif=exif, dpi=(300, 300), icc_profile=b"profile" * 30)
    return buffer.getvalue()


SHOW = (
    "im = Image.open(image_path)\n"
    "info = im.info\n"
    "print(im.mode, im.size, im.format, im.getexif().get(0x010F), round(info['dpi'][0]), len(info['icc_profile']))"
)


def test_a_file_keeps_its_bytes_format_and_metadata(sandbox: Sandbox, image: Image.Image, tmp_path: Path) -> None:
    for format, mode in (("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGBA"), ("PNG", "P"), ("TIFF", "CMYK")):
        data = detailed(image.convert(mode), format)
        (tmp_path / "photo").write_bytes(data)
        result = sandbox.run(
            SHOW + "\nimport hashlib\nprint(hashlib.sha256(open(image_path, 'rb').read()).hexdigest())",
            tmp_path / "photo",
        )
        assert result.stdout.splitlines() == [
            f"{mode} (120, 80) {format} Maker 300 210",
            hashlib.sha256(data).hexdigest(),
        ], result


def test_a_turned_file_is_upright_and_keeps_the_rest(sandbox: Sandbox, image: Image.Image, tmp_path: Path) -> None:
    (tmp_path / "photo").write_bytes(detailed(image, "JPEG", orientation=6))
    result = sandbox.run(SHOW, tmp_path / "photo")
    assert result.stdout == "RGB (80, 120) JPEG Maker 300 210\n", result


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "YCbCr", "I", "F", "I;16"])
def test_an_image_in_memory_comes_without_loss(sandbox: Sandbox, image: Image.Image, mode: str) -> None:
    given = image.convert("L").convert("I").point(lambda v: v * 200) if mode in ("I", "I;16") else image
    given = given.convert(mode)
    code = "im = Image.open(image_path)\nim.load()\nprint(im.mode, im.size, sum(im.tobytes()))"
    assert sandbox.run(code, given).stdout == f"{mode} {given.size} {sum(given.tobytes())}\n"


def test_a_returned_pixel_counts_as_the_caller_keeps_it() -> None:
    """Four bytes, the fourth of which is Pillow's own."""
    config = SandboxConfig(workers=1, memory_mib=100, scratch_mib=10, max_pixels=3 << 20)
    assert config.worker_mib == 100 + 10 + 12
