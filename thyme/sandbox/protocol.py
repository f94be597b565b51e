"""The messages between the client and the fork-server. One socket (SOCK_SEQPACKET), JSON, descriptors beside it.

From the client: first a Setup, then one Order for each process, with four descriptors (stdout, session socket, pixels,
code), a Held for each process that copies were ordered of, and last GOODBYE from a client that cleans up after itself.
From the fork-server: {"hello": ...} once, then {"ended": [...]}, what became of each process that has ended or could
not be started, and beside it, where one was started, {"forked": id} with its pidfd.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict, final

from thyme.sandbox.config import SandboxConfig

MESSAGE_BYTES = 64 * 1024
"""The longest message, in either direction."""
GOODBYE = b"{}"
PICTURE = struct.Struct("=II")
"""From a child, by the socket for pixels: width and height of the picture that follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a fork-server needs to know before it does anything."""

    config: SandboxConfig
    run_dir: Path
    """The client's folder: images, scratch folders, the root file system."""
    off: frozenset[str]
    """Layers that are switched off, so that tests can show that each of them is needed."""
    groups: tuple[Path, ...]
    """The control groups the fork-server was put into."""

    def encode(self) -> bytes:
        """The message."""
        message = {
            "config": asdict(self.config),
            "run_dir": str(self.run_dir),
            "off": sorted(self.off),
            "groups": [str(group) for group in self.groups],
        }
        return json.dumps(message).encode()

    @classmethod
    def decode(cls, message: bytes) -> Setup:
        """What `encode` made a message of."""
        fields = json.loads(message)
        config = {**fields["config"], "preload": tuple(fields["config"]["preload"])}
        return cls(
            config=SandboxConfig(**config),
            run_dir=Path(fields["run_dir"]),
            off=frozenset(fields["off"]),
            groups=tuple(map(Path, fields["groups"])),
        )


@final
class Order(TypedDict):
    """A request for the process of one session."""

    id: str
    image_path: str
    """The path of the input image as the model was told it."""
    image_file: str | None
    """The name of the stored image in the folder of images, None without an image."""
    image_format: str | None
    """What the image was before it was stored ("JPEG"); None where that is not known."""
    more_images: list[tuple[str, str]]
    """Further images: the path the model was told, and the name of the stored one."""
    seed: int
    fork_of: str | None
    """The id of the process it is to be a copy of, once that one holds still; None for a new session's."""


@final
class Held(TypedDict):
    """A process holds still from here on, until all its copies have answered."""

    held: str
    """Its id."""
