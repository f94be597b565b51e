"""What the vision tower makes of pictures: encoded once, shared by all who show them, kept while there is room."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from thyme.engine.batch import ImageSlice
from thyme.model.image_processor import ImageInputs
from thyme.model.model import Model


@dataclass(slots=True)
class _Features:
    """Of one picture. Its pixels are with the sequences that show it."""

    holders: int = 0
    values: Tensor | None = field(default=None)
    """[num_tokens, H]; None until first needed, and again when the weights change."""


class ImageFeatures:
    """By digest: of what live sequences show, and of what was shown last.

    Args:
        model: its vision tower is run.
        one_by_one: encode each picture alone, so that its bits do not depend on others.
        cache_bytes: of features that nobody shows any more.
    """

    def __init__(self, model: Model, *, one_by_one: bool, cache_bytes: int) -> None:
        self.model = model
        self.one_by_one = one_by_one
        self.cache_bytes = cache_bytes
        self.cached_bytes = 0
        """Of features that nobody shows."""
        self.num_encoded = 0
        """Pictures encoded so far."""
        self._features: OrderedDict[str, _Features] = OrderedDict()  # what was let go first leads

    def __len__(self) -> int:
        return len(self._features)

    def hold(self, images: Iterable[ImageInputs]) -> None:
        """A sequence shows these from now on."""
        for image in images:
            known = self._features.setdefault(image.digest, _Features())
            if known.holders == 0 and known.values is not None:
                self.cached_bytes -= known.values.nbytes
            known.holders += 1

    def release(self, images: Iterable[ImageInputs]) -> None:
        """The sequence is gone."""
        for image in images:
            known = self._features[image.digest]
            known.holders -= 1
            if known.holders == 0 and known.values is None:
                del self._features[image.digest]
            elif known.holders == 0 and known.values is not None:
                self._features.move_to_end(image.digest)
                self.cached_bytes += known.values.nbytes
        if self.cached_bytes > self.cache_bytes:
            for digest in [digest for digest, known in self._features.items() if known.holders == 0]:
                self.cached_bytes -= _values(self._features.pop(digest)).nbytes
                if self.cached_bytes <= self.cache_bytes:
                    break

    def is_encoded(self, digest: str) -> bool:
        """Whether the features of a picture that is shown are there."""
        return self._features[digest].values is not None

    def forget(self) -> None:
        """The weights have changed: what is still to be prefilled is encoded again."""
        self.cached_bytes = 0
        for digest, known in list(self._features.items()):
            known.values = None
            if known.holders == 0:
                del self._features[digest]

    def of(self, slices: list[ImageSlice]) -> Tensor:
        """[M, H] features of all slices in their order; pictures are encoded where they were not."""
        images = {part.image.digest: part.image for part in slices}
        missing = [image for image in images.values() if not self.is_encoded(image.digest)]
        for group in ([image] for image in missing) if self.one_by_one else ([missing] if missing else ()):
            pixels = torch.from_numpy(np.concatenate([image.pixel_values for image in group]))
            pixels = pixels.to(self.model.device, self.model.dtype)
            features = self.model.encode_images(pixels, [image.grid for image in group])
            for image, values in zip(group, features.split([image.num_tokens for image in group]), strict=True):
                # A part of its own: what is kept of one picture must not keep the memory of its group.
                self._features[image.digest].values = values.clone() if len(group) > 1 else values
            self.num_encoded += len(group)
        return torch.cat([_values(self._features[p.image.digest])[p.start : p.start + p.count] for p in slices])


def _values(features: _Features) -> Tensor:
    assert features.values is not None
    return features.values
