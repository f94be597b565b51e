"""Images on disk, each once, named by what they show.

An image's name is the SHA-256 of its mode, size and pixels, not of the file: a picture that is already there need not
be compressed to find that out. Files are written under another name and renamed, so none is ever half there.
"""

import hashlib
import json
import secrets
from pathlib import Path

from PIL import Image

from thyme.pictures import to_rgb, upright

PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA"}


class ImageFolder:
    """PNG files named by what they show."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._loaded: dict[str, Image.Image] = {}

    def add(self, image: Image.Image) -> str:
        """Writes the image unless it is there, returns its name (without folder and ending)."""
        image = upright(image) if image.mode in PNG_MODES else to_rgb(image)
        digest = hashlib.sha256(f"{image.mode} {image.width} {image.height} ".encode())
        digest.update(json.dumps(image.getpalette()).encode() if image.mode == "P" else b"")
        digest.update(image.tobytes())
        name = digest.hexdigest()
        path = self.path(name)
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            # Processes of several machines may write the same one: none of them may take the other's half.
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
            image.save(temporary, format="PNG", compress_level=1)
            temporary.replace(path)
        return name

    def get(self, name: str) -> Image.Image:
        """The image, loaded; the same object for the same name."""
        if name not in self._loaded:
            image = Image.open(self.path(name))
            image.load()
            self._loaded[name] = image
        return self._loaded[name]

    def path(self, name: str) -> Path:
        """Where the image of that name is kept."""
        return self.folder / f"{name}.png"
