"""Any picture becomes RGB in one place: modes, formats, orientation, damage."""

import io
import random
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from thyme.model.config import ImageConfig
from thyme.model.image_processor import ImageProcessor
from thyme.pictures import read_picture, to_rgb, upright
from thyme.rollout.image_folder import ImageFolder
from thyme.rollout.types import Question
from thyme.sandbox import Sandbox, SandboxConfig

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM", "ICO", "TGA", "JPEG2000")
RAMP = np.tile(np.arange(0, 65536, 257, dtype=np.uint16), (64, 1))  # 256 levels


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def photograph(mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC).convert(mode)


def turned() -> tuple[Image.Image, Image.Exif]:
    """A picture with a red left half, and the tag that turns its left side up."""
    image = Image.new("RGB", (32, 16), "blue")
    image.paste("red", (0, 0, 16, 16))
    exif = image.getexif()
    exif[0x0112] = 6
    return image, exif


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(RAMP, id="uint16"),
        pytest.param(RAMP.astype(np.int32), id="int32 within 16 bits"),
        pytest.param(RAMP.astype(np.int32) * 7000 - 99, id="int32 beyond"),
        pytest.param((RAMP / 65535).astype(np.float32), id="fractions"),
        pytest.param((RAMP / 257).astype(np.float32), id="eight bits as floats"),
        pytest.param((RAMP.astype(np.float32) - 3e4) * 1e30, id="floats beyond"),
    ],
)
def test_grey_of_any_depth_keeps_its_256_levels(values: np.ndarray) -> None:
    grey = np.asarray(to_rgb(Image.fromarray(values)))
    assert grey.shape == (64, 256, 3) and (grey[0, :, 0] == np.arange(256)).all()


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_a_sixteen_bit_file_is_no_white_square(form: str, tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "scan.img", form)
    grey = np.asarray(read_picture(tmp_path / "scan.img"))
    assert (grey[0, :, 0] == np.arange(256)).all()


@pytest.mark.parametrize(("bits", "order"), [(8, "<"), (8, ">"), (16, "<")])  # Pillow reads no other one
def test_a_tiff_whose_zero_is_white_is_no_negative(bits: int, order: str) -> None:
    """By hand, as Pillow writes none: 256 x 1, from black to white."""
    values = np.arange(255, -1, -1) * (257 if bits == 16 else 1)
    pixels = values.astype(f"{order}u{bits // 8}").tobytes()
    tags = ((256, 256), (257, 1), (258, bits), (259, 1), (262, 0), (273, 110), (277, 1), (279, len(pixels)))
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    head = struct.pack(f"{order}2sHIH", {"<": b"II", ">": b"MM"}[order], 42, 8, len(tags))
    data = (head + entries + bytes(4)).ljust(110, b"\0") + pixels
    assert np.array_equal(np.asarray(read_picture(data))[0, :, 0], np.arange(256))


def test_the_clear_colour_of_a_sixteen_bit_png() -> None:
    """By hand too. A dark one, of which the lower half of each channel says more than the upper."""
    clear, other = struct.pack(">3H", 300, 40, 9), struct.pack(">3H", 40_000, 40, 9)
    parts = ((b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)), (b"tRNS", clear))
    parts += ((b"IDAT", zlib.compress(b"\0" + clear + other)), (b"IEND", b""))
    chunks = [struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in parts]
    image = read_picture(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (156, 0, 0)]


def test_a_dark_sixteen_bit_picture_stays_dark() -> None:
    for values in (np.full((8, 8), 200, np.uint16), np.full((8, 8), 513, np.uint16)):
        assert np.asarray(read_picture(encoded(Image.fromarray(values), "PNG"))).max() <= 2
        assert np.asarray(read_picture(encoded(Image.fromarray(values), "PPM"))).max() <= 2


def test_a_file_of_fractions_is_no_black_square() -> None:
    """A portable float map, which Pillow calls a PPM, as it does the one of 16 bits."""
    header = b"Pf\n4 4\n-1.0\n"
    assert read_picture(header + np.full((4, 4), 0.5, "<f4").tobytes()).getpixel((0, 0)) == (128, 128, 128)


def test_what_is_not_a_number_is_black() -> None:
    values = np.array([[np.nan, np.inf], [0.0, 1.0]], dtype=np.float32)
    assert np.asarray(to_rgb(Image.fromarray(values)))[..., 0].tolist() == [[0, 255], [0, 255]]
    assert to_rgb(Image.fromarray(np.full((2, 2), np.nan, np.float32))).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", "RGBA", "LA", "PA", "La", "RGBa"]
)
def test_every_mode_of_pillow_shows_what_it_held(mode: str) -> None:
    grey = Image.new("L", (8, 8), 255)
    grey.paste(0, (0, 0, 4, 8))
    if mode in ("LAB", "La", "RGBa", "PA"):
        image = {
            "LAB": lambda: Image.merge("LAB", (grey, Image.new("L", (8, 8), 128), Image.new("L", (8, 8), 128))),
            "La": lambda: grey.convert("LA").convert("La"),
            "RGBa": lambda: grey.convert("RGBA").convert("RGBa"),
            "PA": lambda: grey.convert("P").convert("PA"),
        }[mode]()
    else:
        image = grey.convert("RGB").convert(mode)
    assert image.mode == mode
    shown = np.asarray(to_rgb(image)).astype(int)
    assert shown.shape == (8, 8, 3) and shown[:, :4].max() <= 2 and shown[:, 4:].min() >= 253


@pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "RGBa", "P", "L", "RGB", "I;16"])
def test_transparency_lies_on_white(mode: str) -> None:
    """A black picture whose left half is transparent, as alpha, as a palette's entry and as one colour."""
    alpha = Image.new("LA", (8, 8), (0, 255))
    alpha.paste((0, 0), (0, 0, 4, 8))
    if mode in ("RGBA", "LA"):
        image = read_picture(encoded(alpha.convert(mode), "PNG"))
    elif mode in ("La", "RGBa"):
        image = to_rgb(alpha.convert("RGBA" if mode == "RGBa" else "LA").convert(mode))
    else:
        clear = {"P": 1, "L": 7, "RGB": (7, 7, 7), "I;16": 7}[mode]
        plain = Image.new("L" if mode == "I;16" else mode, (8, 8), 0)
        if mode == "P":
            plain.putpalette([0, 0, 0, 255, 0, 0])
        plain.paste(clear, (0, 0, 4, 8))
        if mode == "I;16":
            plain = Image.fromarray(np.asarray(plain).astype(np.uint16))
        image = read_picture(encoded(plain, "PNG", transparency=clear))
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((7, 0)) == (0, 0, 0)


def test_half_transparent_is_rounded_as_the_original_rounds() -> None:
    image = Image.merge("RGBA", [Image.linear_gradient("L").resize((256, 256)).rotate(90 * i) for i in range(4)])
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.split()[3])
    assert to_rgb(image).tobytes() == white.tobytes()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("kind", ["path", "bytes"])
def test_orientation_is_applied_once(form: str, kind: str, tmp_path: Path) -> None:
    image, exif = turned()
    data = encoded(image, form, exif=exif)
    (tmp_path / "phone").write_bytes(data)
    read = read_picture(data if kind == "bytes" else tmp_path / "phone")
    for again in (read, to_rgb(read), to_rgb(read.convert("L").convert("RGB")), upright(read)):
        assert again.size == (16, 32)
    red, _, blue = read.getpixel((8, 4))  # type: ignore[misc]
    assert red > 200 > 60 > blue  # the left half is up


@pytest.mark.parametrize("orientation", [0, 1, 9, 99])
def test_a_value_that_names_no_orientation_turns_nothing(orientation: int) -> None:
    image, exif = turned()
    exif[0x0112] = orientation
    assert read_picture(encoded(image, "JPEG", exif=exif)).size == (32, 16)


def test_a_damaged_exif_block_does_not_cost_the_picture() -> None:
    image = turned()[0]
    for block in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + bytes(range(200))):
        assert read_picture(encoded(image, "PNG", exif=block)).size == (32, 16)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_its_first_frame(form: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue", "green")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    assert read_picture(data).getpixel((8, 8))[0] > 200  # type: ignore[index]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read(form: str) -> None:
    image = photograph()
    read = read_picture(encoded(image, form, **({"sizes": [image.size]} if form == "ICO" else {})))
    assert read.mode == "RGB" and read.size == image.size
    assert np.abs(np.asarray(read).astype(int) - np.asarray(image).astype(int)).mean() < 40


def test_every_place_sees_the_same_picture(tmp_path: Path) -> None:
    """The processor, a question, records and a sandbox's result agree on what a picture is."""
    image, exif = turned()
    phone = Image.open(io.BytesIO(encoded(image, "PNG", exif=exif)))
    scan = Image.fromarray(RAMP)
    processor = ImageProcessor(ImageConfig())
    folder = ImageFolder(tmp_path)
    for picture in (phone, scan):
        seen = processor.preprocess(read_picture(encoded(picture, "PNG", exif=picture.getexif()))).digest
        question = Question(id="q", image=picture, image_path="a.png", question="?", solution="")
        assert question.image is not None
        assert processor.preprocess(picture).digest == seen
        assert processor.preprocess(question.image).digest == seen
        assert processor.preprocess(folder.get(folder.add(picture))).digest == seen
        with Sandbox(SandboxConfig(workers=1)) as sandbox, sandbox.session(picture, "a.png") as session:
            result = session.run(
                "from PIL import Image\nim = Image.open('a.png')\nprint(im.size)\nim.save('b.png')\nprint('b.png')"
            )
            assert result.stdout.startswith(str(question.image_size)), result
            assert processor.preprocess(result.images[0]).digest == seen


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff", "avif"])
def test_a_snippet_returns_any_format(suffix: str) -> None:
    with Sandbox(SandboxConfig(workers=1)) as sandbox:
        result = sandbox.run(
            f"from PIL import Image\nImage.new('RGB', (20, 10), 'red').save('r.{suffix}')\nprint('r.{suffix}')"
        )
    assert [image.size for image in result.images] == [(20, 10)], result
    assert result.images[0].getpixel((5, 5))[0] > 200  # type: ignore[index]


def test_what_cannot_be_read_is_one_line_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photograph(), "PNG")
    for name, content in {"cut.png": data[: len(data) // 2], "text.png": b"not an image", "nothing.png": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name) as caught:
            read_picture(tmp_path / name)
        assert "\n" not in str(caught.value)
    for missing in (tmp_path / "missing.png", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_picture(missing)
    with pytest.raises(ValueError, match="row 3, image 0: not an image"):
        read_picture(b"GIF89a", "row 3, image 0")
    Image.new("1", (300, 300)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"bomb.png.*decompression bomb"):
        read_picture(tmp_path / "bomb.png")


def test_a_picture_that_cannot_be_decoded_is_named_by_the_processor() -> None:
    data = encoded(photograph(), "PNG")
    cut = Image.open(io.BytesIO(data[: len(data) // 2]))
    with pytest.raises(ValueError, match="image: can't be read"):
        ImageProcessor(ImageConfig()).preprocess(cut)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, cut, repeated or swapped with another place."""
    broken = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(broken) if draw.random() < 0.5 else min(len(broken), 96))
        match draw.randrange(5):
            case 0:
                broken[at] = draw.randrange(256)
            case 1:
                broken[at : at + 4] = draw.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\1\0\1"))
            case 2:
                del broken[at + 1 : at + draw.randrange(2, 40)]
            case 3:
                broken[at:at] = broken[at : at + draw.randrange(1, 40)]
            case 4:
                broken = broken[: max(1, at)]
    return bytes(broken)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=pytest.mark.soak)])
def test_damaged_files_are_pictures_or_one_clear_error(form: str, count: int) -> None:
    draw = random.Random(count)
    exif = turned()[1]
    seeds = [encoded(photograph(), form)]
    if form in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        seeds.append(encoded(photograph(), form, exif=exif))
    if form in ("GIF", "PNG", "TIFF", "JPEG2000"):
        seeds.append(encoded(photograph("L"), form))
    outcomes = {"read": 0, "refused": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow says what it finds odd
        for _ in range(count):
            try:
                read = read_picture(mutated(draw.choice(seeds), draw), "it")
            except ValueError as error:
                assert str(error).startswith("it: ") and "\n" not in str(error)
                outcomes["refused"] += 1
            else:
                assert (
                    read.mode == "RGB" and min(read.size) >= 1 and len(read.tobytes()) == 3 * read.width * read.height
                )
                outcomes["read"] += 1
    assert outcomes["read"] and outcomes["refused"], outcomes
