"""Pictures that a process which is not trusted sends, read while it sends them: a strip at a time, each into its place.

Through one socket, a stream of bytes: of each picture its width and height (protocol.PICTURE), then its rows, RGB. The
process waits where it is ahead of the reader, so that nothing piles up in between and both work at once. What was read
is a copy that the process cannot change any more. The other end: result_images.py.
"""

from __future__ import annotations

import contextlib
import socket
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

from thyme.sandbox.config import BYTES_PER_PIXEL, SandboxConfig
from thyme.sandbox.protocol import PICTURE

if TYPE_CHECKING:
    from PIL import Image

_STRIP_BYTES = 256 << 10
"""Read, summed and unpacked at a time: what the processor's nearer memory holds."""
_TURN_BYTES = 1 << 20
"""About as much is read before other sockets get their turn."""
_WAITING_BYTES = 1 << 20
"""That the process may be ahead; the kernel grants what it grants."""


class Picture(NamedTuple):
    """One that is there as a whole."""

    image: Image.Image
    """RGB, in memory of its own."""
    pixel_sum: int
    """CRC-32 of its RGB bytes."""


class PixelStream:
    """The reading end of the socket, and until the process has it, the other one.

    Args:
        config: how many pictures of how many pixels and of which form a round may return.
    """

    def __init__(self, config: SandboxConfig) -> None:
        self._config = config
        self.socket, self.far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.far_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _WAITING_BYTES)
        self.has_ended = False
        """Whether the process hung up."""
        self._start_round()

    def close(self) -> None:
        """Closes both ends. What has come is gone."""
        self.socket.close()
        self.far_end.close()
        self._start_round()

    def receive(self) -> bool:
        """Reads what has come, no more than a turn's share of it. Returns whether there was anything.

        Raises:
            ValueError: a picture is over the limits.
        """
        total = 0
        with contextlib.suppress(BlockingIOError):
            while total < _TURN_BYTES:
                num = self.socket.recv_into(self._wanted())
                if not num:
                    self.has_ended = True
                    break
                total += num
                self._have(num)
        return total > 0

    def take(self, sizes: Any) -> list[Picture]:
        """The pictures of a round that is over, read to the end. What it sent beyond them, as where it was interrupted,
        is dropped.

        Args:
            sizes: what the process says that it sent: [width, height] of each.

        Raises:
            ValueError: it did not.
        """
        while self.receive():
            pass
        pictures = self._pictures
        self._start_round()
        if type(sizes) is not list or sizes != [list(picture.image.size) for picture in pictures[: len(sizes)]]:
            raise ValueError("the pictures it tells of did not come")
        return pictures[: len(sizes)]

    def _start_round(self) -> None:
        self._pictures: list[Picture] = []
        self._num_pixels = 0
        self._header = memoryview(bytearray(PICTURE.size))
        self._missing = PICTURE.size
        self._arriving: _Arriving | None = None

    def _wanted(self) -> memoryview:
        """Where the next bytes belong."""
        return self._header[-self._missing :] if self._arriving is None else self._arriving.wanted()

    def _have(self, num: int) -> None:
        """So many bytes were put there."""
        if self._arriving is None:
            self._missing -= num
            if not self._missing:
                self._missing = PICTURE.size
                self._arriving = self._announced(*PICTURE.unpack(self._header))
        elif self._arriving.have(num):
            self._pictures.append(self._arriving.picture())
            self._arriving = None

    def _announced(self, width: int, height: int) -> _Arriving:
        config, shorter = self._config, min(width, height)
        if len(self._pictures) >= config.max_images:
            raise ValueError("too many images")
        self._num_pixels += width * height
        if shorter < 1 or self._num_pixels > config.max_pixels or max(width, height) > config.max_aspect * shorter:
            raise ValueError("image over the limits")
        return _Arriving(width, height)


class _Arriving:
    """A picture of which rows are missing."""

    def __init__(self, width: int, height: int) -> None:
        import numpy as np
        from PIL import Image

        self._width, self._height, self._top, self._filled, self._sum = width, height, 0, 0, 0
        self._row = width * BYTES_PER_PIXEL
        self._strip = np.empty(min(height, max(1, _STRIP_BYTES // self._row)) * self._row, np.uint8).data
        # Not in huge pages, though first touches are half of what this costs: those that are free then lay in processes
        # that have ended, and on a virtual machine the host may have taken them back: it gives them again at thrice
        # the cost.
        self._image = Image.new("RGB", (width, height), None)

    def wanted(self) -> memoryview:
        """What is missing of the strip that is read."""
        return self._strip[self._filled : (self._height - self._top) * self._row]

    def have(self, num: int) -> bool:
        """So much of that is there. Returns whether the picture is complete."""
        self._filled += num
        rows = self._filled // self._row
        if self._filled == len(self._strip) or self._top + rows == self._height:
            self._unpack(self._strip[: self._filled], rows)
            self._top, self._filled = self._top + rows, 0
        return self._top == self._height

    def picture(self) -> Picture:
        """The picture, complete."""
        return Picture(self._image, self._sum)

    def _unpack(self, strip: memoryview, rows: int) -> None:
        from PIL import Image

        self._sum = zlib.crc32(strip, self._sum)
        decoder: Any = Image._getdecoder("RGB", "raw", ("RGB", 0, 1))
        decoder.setimage(self._image.im, (0, self._top, self._width, self._top + rows))
        decoder.decode(strip)
