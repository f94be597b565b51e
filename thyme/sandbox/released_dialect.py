"""`compat="released"`: rewrites code as the published Thyme sandbox does before it runs it.

Released checkpoints were trained on its outcome: crops of at least 64 pixels, eight decimals in f-strings. It changes
what correct programs mean, which is why it is off by default. As there, only a tuple of four plain numbers is a box
(a minus sign makes it an expression), only where it is assigned to names such as x1 or crop_box, and corners count as
those of the input image whatever is cropped. Its slices of arrays never changed on any Python still in use.

Not reproduced: the first line pulled to the indent of the second and autopep8 with `aggressive`, which break programs
that run and repair none that repair.py does not, the refusal of dangerous words, and chmod on the input.
"""

from __future__ import annotations

import ast
import math
import os
import re

from thyme.sandbox.result import Fix

MIN_CROP = 64
_CORNERS = {"x1", "y1", "x2", "y2", "left", "top", "right", "bottom"}
_BOXES = {"crop_box", "bbox", "box", "coordinates", "coords"}
_BOXES |= {"crop_coords", "left_crop_coords", "right_crop_coords", "top_crop_coords", "bottom_crop_coords"}
_EXTENSIONS = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tiff", ".webp")
_OPENCV = {"cv", "cv3", "cv4", "CV"}
_DECIMALS = re.compile(r":\.\df\}")


def grow_box(box: tuple[float, float, float, float], width: int, height: int) -> tuple[int, int, int, int]:
    """Corners in order, clamped to the image, each side at least 64 pixels: to the right and down, at the edge to the
    left and up, and all of an image that is smaller."""

    def side(low: float, high: float, size: int) -> tuple[int, int]:
        low, high = sorted((low, high))
        low, high = min(max(0, low), size - 1), min(max(0, high), size)
        if low >= high:
            low = max(0, high - 1)
        if high - low < MIN_CROP:
            high = low + MIN_CROP
            if high > size:
                low, high = max(0, size - MIN_CROP), size
        return round(low), round(high)

    (x1, x2), (y1, y2) = side(box[0], box[2], width), side(box[1], box[3], height)
    return x1, y1, x2, y2


class _Rewriter(ast.NodeVisitor):
    """Collects what to put in place of which part of the text: lines keep their numbers."""

    def __init__(self, image_path: str, image_size: tuple[int, int] | None) -> None:
        self.image_path, self.image_size = image_path, image_size
        self.edits: list[tuple[ast.expr, str]] = []
        self.fixes: list[Fix] = []

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        if len(node.targets) == 1:
            if isinstance(node.targets[0], ast.Name) and node.targets[0].id == "image_path":
                self._point_at_the_image(node.value)
            elif self.image_size is not None and _takes_a_box(node.targets[0]):
                self._grow(node.value, self.image_size)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        if isinstance(node.value, ast.Name) and node.value.id in _OPENCV:
            self._edit(node.value, "cv2", "opencv", f"{node.value.id}.{node.attr} became cv2.{node.attr}")

    def _edit(self, node: ast.expr, text: str, kind: str, message: str) -> None:
        self.edits.append((node, text))
        self.fixes.append(Fix(kind, node.lineno, message))

    def _point_at_the_image(self, value: ast.expr) -> None:
        text = value.value if isinstance(value, ast.Constant) else None
        if not isinstance(text, str) or text == self.image_path:
            return
        if not (os.path.isfile(text) and text.lower().endswith(_EXTENSIONS)):  # noqa: PTH113 (the jail's hook)
            self._edit(value, repr(self.image_path), "path", f"image_path set to {self.image_path!r}")

    def _grow(self, value: ast.expr, size: tuple[int, int]) -> None:
        if not isinstance(value, ast.Tuple) or len(value.elts) != 4:
            return
        box = [e.value for e in value.elts if isinstance(e, ast.Constant) and isinstance(e.value, (int, float))]
        if len(box) != 4 or not all(map(math.isfinite, box)):
            return
        grown = grow_box((box[0], box[1], box[2], box[3]), *size)
        if grown != tuple(round(v) for v in box):
            message = f"{tuple(box)} became {grown} (released sandbox: 64 pixels at least)"
            self._edit(value, str(grown), "crop", message)


def _takes_a_box(target: ast.expr) -> bool:
    """A name known for boxes, or four names among which there is a corner."""
    if isinstance(target, ast.Name):
        return target.id in _BOXES
    names = [e.id.lower() for e in target.elts if isinstance(e, ast.Name)] if isinstance(target, ast.Tuple) else []
    return isinstance(target, ast.Tuple) and len(names) == len(target.elts) == 4 and bool(_CORNERS & set(names))


def rewrite(code: str, *, image_path: str, image_size: tuple[int, int] | None) -> tuple[str, tuple[Fix, ...]]:
    """`code` as the released sandbox would run it, line for line. What does not parse is only given its decimals.

    Args:
        image_path: what an `image_path` that is no existing image file is set to.
        image_size: (width, height) in pixels; None leaves boxes alone.
    """
    fixes: list[Fix] = []
    text = _DECIMALS.sub(":.8f}", code)
    if text != code:
        fixes.append(Fix("decimals", 0, "f-strings show eight decimals (released sandbox)"))
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return text, tuple(fixes)
    rewriter = _Rewriter(image_path, image_size)
    rewriter.visit(tree)
    return _edited(text, rewriter.edits), (*fixes, *rewriter.fixes)


def _edited(text: str, edits: list[tuple[ast.expr, str]]) -> str:
    """`text` with the parts of some expressions replaced; each keeps its number of lines."""
    data = text.encode()
    starts = [0, *(match.end() for match in re.finditer(rb"\r\n|\r|\n", data))]

    def place(line: int | None, column: int | None) -> int:
        assert line is not None and column is not None
        return starts[line - 1] + column

    for node, new in sorted(edits, key=lambda edit: (edit[0].lineno, edit[0].col_offset), reverse=True):
        lines = (node.end_lineno or node.lineno) - node.lineno
        if lines:
            new = f"({new}" + "\n" * lines + ")"
        start, end = place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)
        data = data[:start] + new.encode() + data[end:]
    return data.decode()
