"""Whether code that was run again gave what it gave before."""

from dataclasses import replace

from PIL import Image

from thyme.rollout.types import Turn
from thyme.sandbox import SandboxResult


def is_same(result: SandboxResult, turn: Turn) -> bool:
    """Whether a result is the turn's, but for what was measured."""
    if turn.result is None:
        return False
    before = turn.result
    measured = {"wall_s": 0.0, "cpu_s": 0.0, "peak_mib": 0.0, "images": ()}
    images = zip(map(_pixels, result.images), map(_pixels, before.images), strict=False)
    return (
        replace(result, **measured) == replace(before, **measured)  # type: ignore[arg-type]
        and len(result.images) == len(before.images)
        and all(one == other for one, other in images)
    )


def _pixels(image: Image.Image) -> tuple[str, tuple[int, int], bytes]:
    return image.mode, image.size, image.tobytes()
