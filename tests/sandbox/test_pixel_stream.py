"""Pictures from a process that is not trusted: exact, in memory of their own, in pieces of any size."""

from __future__ import annotations

import gc
import socket
import struct
import weakref
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.sandbox.host import eventually, open_descriptors
from thyme.sandbox import Sandbox, SandboxConfig, Status, pixel_stream
from thyme.sandbox.pixel_stream import PixelStream


@pytest.fixture
def stream():
    stream = PixelStream(SandboxConfig(max_images=3, max_pixels=4000, max_aspect=200.0))
    yield stream
    stream.close()


def sent(width: int, height: int, seed: int = 0) -> tuple[np.ndarray, bytes]:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return pixels, struct.pack("=II", width, height) + pixels.tobytes()


@pytest.mark.parametrize("strip_bytes", [1 << 20, 1000, 150, 10])
@pytest.mark.parametrize("piece", [1 << 20, 997, 3, 1])
def test_pictures_come_to_the_pixel(
    stream: PixelStream, strip_bytes: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixel_stream, "_STRIP_BYTES", strip_bytes)
    for sizes in ([(1, 1)], [(37, 53), (53, 37)], [(400, 2), (2, 3), (3, 200)], []):  # rounds
        pictures = [sent(*size, seed=i) for i, size in enumerate(sizes)]
        message = b"".join(content for _, content in pictures)
        for start in range(0, len(message), piece):
            stream.far_end.send(message[start : start + piece])
            stream.receive()
        came = stream.take([list(size) for size in sizes])
        for (pixels, _), (image, pixel_sum) in zip(pictures, came, strict=True):
            assert image.mode == "RGB" and np.array_equal(np.asarray(image), pixels)
            assert pixel_sum == zlib.crc32(image.tobytes())


def test_a_picture_is_like_any_other_of_pillow(stream: PixelStream) -> None:
    pixels, content = sent(37, 53)
    stream.far_end.send(content)
    (image, _), like = stream.take([[37, 53]])[0], Image.fromarray(pixels)
    assert image == like and image.convert("RGBA") == like.convert("RGBA") and image.copy() == like
    for one in (image, like):
        one.load()[3, 4] = one.load()[4, 3] = (1, 2, 3)
        one.putpixel((0, 0), (4, 5, 6))
        one.paste((7, 8, 9), (10, 10, 20, 20))
    assert image == like and image.rotate(90, expand=True) == like.rotate(90, expand=True)
    assert image.getbbox() == like.getbbox() and image.resize((9, 9)) == like.resize((9, 9))


def test_what_is_not_a_whole_picture_of_the_result_is_dropped(stream: PixelStream) -> None:
    pixels, content = sent(30, 20)
    stream.far_end.send(content + content + content[:100])  # interrupted in the third
    assert [np.array_equal(picture.image, pixels) for picture in stream.take([[30, 20]])] == [True]
    stream.far_end.send(content)
    assert np.array_equal(stream.take([[30, 20]])[0].image, pixels)
    stream.far_end.send(content[:3])
    assert stream.take([]) == []
    stream.far_end.send(content)
    stream.far_end.close()
    assert len(stream.take([[30, 20]])) == 1 and stream.has_ended


@pytest.mark.parametrize("sizes", [[[20, 30]], [[30, 20], [30, 20]], [[30, 20, 1]], [30, 20], {}, None, 1, "x", [None]])
def test_what_it_says_that_it_sent_must_have_come(stream: PixelStream, sizes) -> None:
    stream.far_end.send(sent(30, 20)[1])
    with pytest.raises(ValueError, match="did not come"):
        stream.take(sizes)


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([struct.pack("=II", 0, 9)], "limits"),
        ([struct.pack("=II", 9, 0)], "limits"),
        ([struct.pack("=II", 4001, 1)], "limits"),
        ([struct.pack("=II", 201, 1)], "limits"),
        ([struct.pack("=II", 0xFFFFFFFF, 0xFFFFFFFF)], "limits"),
        ([sent(50, 40)[1], struct.pack("=II", 50, 41)], "limits"),  # together
        ([sent(9, 9)[1]] * 3 + [struct.pack("=II", 9, 9)], "too many"),
    ],
)
def test_what_is_over_the_limits_is_refused_before_it_comes(stream: PixelStream, messages, match: str) -> None:
    stream.far_end.send(b"".join(messages))
    with pytest.raises(ValueError, match=match):
        while stream.receive():
            pass


def test_the_sender_waits_for_the_reader(stream: PixelStream) -> None:
    stream.far_end.setblocking(False)
    ahead = 0
    with pytest.raises(BlockingIOError):
        while ahead < 8 << 20:
            ahead += stream.far_end.send(bytes(1 << 16))


def test_a_result_is_nobodys_but_the_callers() -> None:
    with Sandbox(SandboxConfig(workers=1)) as sandbox, sandbox.session() as session:
        for shade in (10, 200):
            result = session.run(f"from PIL import Image\nImage.new('L', (3000, 3000), {shade}).save('a.png')")
            assert result.images[0].getpixel((2999, 2999)) == (shade,) * 3
            kept = weakref.ref(result.images[0])
            del result
            gc.collect()
            assert eventually(lambda kept=kept: kept() is None)  # neither the session nor the client holds it


@pytest.mark.parametrize("sends", [b"x" * 8, struct.pack("=II", 9, 9)])
def test_pixels_between_two_rounds_end_the_process(sends: bytes) -> None:
    code = (
        "import os, time, thyme.sandbox.child as c\n"
        f"c._read = lambda *a: (time.sleep(0.5), os.write(4, {sends!r}), time.sleep(60))"
    )
    with Sandbox(SandboxConfig(workers=1)) as sandbox, sandbox.session() as session:
        assert session.run(code).status is Status.OK
        assert eventually(lambda: session._state.child is None)
        again = session.run("print(1)")
        assert again.status is Status.OK and again.restarted


def test_a_picture_that_stops_coming_meets_the_time_limit() -> None:
    code = "import os, struct, time\nos.write(4, struct.pack('=II', 900, 900) + bytes(999))\ntime.sleep(60)"
    with Sandbox(SandboxConfig(workers=1, timeout_s=0.5)) as sandbox:
        assert sandbox.run(code).status is Status.TIMEOUT
        assert sandbox.run("print(1)").stdout == "1\n"


def test_a_closed_socket_is_left_alone() -> None:
    with Sandbox(SandboxConfig(workers=1)) as sandbox, sandbox.session() as session:
        assert session.run("import os\nos.close(4)").status is Status.OK
        child = session._state.child
        assert child is not None  # it can always be read: whoever went on watching it would turn round and round
        assert eventually(lambda: not sandbox._client.reader.is_watched(child.pixels.socket))
        assert session.run("print(2)").stdout == "2\n"


def test_descriptors_sent_along_go_nowhere(stream: PixelStream) -> None:
    before = open_descriptors()
    socket.send_fds(stream.far_end, [sent(9, 9)[1]], [0, 1, 2])
    assert len(stream.take([[9, 9]])) == 1 and open_descriptors() == before
