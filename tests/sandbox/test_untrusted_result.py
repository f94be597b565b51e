"""Pixels out of memory shared with a process that is not trusted: copied, exactly, whole or in strips."""

from __future__ import annotations

import os
import zlib

import numpy as np
import pytest

from thyme.sandbox import untrusted_result


@pytest.mark.parametrize("strip_bytes", [48 << 20, 1000, 150, 10])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (37, 53), (53, 37), (400, 2)])
def test_an_image_is_read_to_the_pixel(
    width: int, height: int, strip_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untrusted_result, "_STRIP_BYTES", strip_bytes)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    fd = os.memfd_create("pixels")
    os.pwrite(fd, pixels.tobytes(), 7)
    image, pixel_sum = untrusted_result._read_image(fd, width, height, 7)
    os.pwrite(fd, bytes(pixels.nbytes), 7)  # a copy: what the process writes later is not seen
    assert np.array_equal(np.asarray(image), pixels)
    assert pixel_sum == zlib.crc32(image.tobytes())
    image.putpixel((0, 0), (1, 2, 3))
    with pytest.raises(ValueError, match="short read"):
        untrusted_result._read_image(fd, width, height, 8)
    os.close(fd)
