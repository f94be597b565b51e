"""`compat="released"`: the rewriting that the published Thyme sandbox does before it runs code.

Released checkpoints were trained on its outcome: crops of at least 64 pixels, eight decimals in f-strings. It changes
what correct programs mean, which is why it is off by default. What its in-process `exec` did beyond that (regular
expressions against dangerous words, chmod on the input) is not reproduced.
"""

from __future__ import annotations

import ast
import re

from thyme.sandbox.result import Fix

MIN_CROP = 64
_CORNERS = {"x1", "y1", "x2", "y2", "left", "top", "right", "bottom"}
_BOXES = {"crop_box", "bbox", "box", "coordinates", "coords", "crop_coords", "left_crop_coords", "right_crop_coords",
          "top_crop_coords", "bottom_crop_coords"}  # fmt: skip
_EXTENSIONS = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tiff", ".webp")
_DECIMALS = re.compile(r":\.\d+f\}")


def grow_box(box: tuple[float, float, float, float], width: int, height: int) -> tuple[int, int, int, int]:
    """Corners in order, clamped to the image, each side at least 64 pixels: to the right and down, at the edge to the
    left and up, and all of an image that is smaller."""

    def side(low: float, high: float, size: int) -> tuple[int, int]:
        low, high = sorted((low, high))
        low, high = max(0.0, min(low, size)), max(0.0, min(high, size))
        if high - low < MIN_CROP:
            high = low + MIN_CROP
            if high > size:
                low, high = max(0.0, size - MIN_CROP), float(size)
        return round(low), round(high)

    (x1, x2), (y1, y2) = side(box[0], box[2], width), side(box[1], box[3], height)
    return x1, y1, x2, y2


class _Rewrite(ast.NodeTransformer):
    def __init__(self, image_path: str, image_size: tuple[int, int] | None) -> None:
        self.image_path, self.image_size = image_path, image_size
        self.fixes: list[Fix] = []

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        self.generic_visit(node)
        target, value = node.targets[0], node.value
        if isinstance(target, ast.Name) and target.id == "image_path" and isinstance(value, ast.Constant):
            text = value.value
            if isinstance(text, str) and (text != self.image_path or not text.lower().endswith(_EXTENSIONS)):
                node.value = ast.copy_location(ast.Constant(self.image_path), value)
                self.fixes.append(Fix("path", node.lineno, f"image_path set to {self.image_path!r}"))
        names = {e.id for e in target.elts if isinstance(e, ast.Name)} if isinstance(target, ast.Tuple) else set()
        is_box = bool(names & _CORNERS) or (isinstance(target, ast.Name) and target.id in _BOXES)
        if is_box and self.image_size is not None and isinstance(value, ast.Tuple) and len(value.elts) == 4:
            self._grow(node, value, self.image_size)
        return node

    def _grow(self, node: ast.Assign, value: ast.Tuple, size: tuple[int, int]) -> None:
        try:
            box = ast.literal_eval(value)
        except ValueError:
            return
        if all(isinstance(v, (int, float)) for v in box):
            grown = grow_box(box, *size)
            if grown != box:
                node.value = ast.copy_location(ast.Tuple([ast.Constant(v) for v in grown], ast.Load()), value)
                self.fixes.append(
                    Fix("crop", node.lineno, f"{box} became {grown} (released sandbox: 64 pixels at least)")
                )

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in ("cv", "cv3", "cv4", "CV"):
            return ast.copy_location(ast.Name("cv2", node.ctx), node)
        return node


def rewrite(code: str, *, image_path: str, image_size: tuple[int, int] | None) -> tuple[str, tuple[Fix, ...]]:
    """`code` as the released sandbox would run it. Code that does not parse is returned as it is, but for decimals."""
    fixes: list[Fix] = []
    text = _DECIMALS.sub(":.8f}", code)
    if text != code:
        fixes.append(Fix("decimals", 0, "f-strings show eight decimals (released sandbox)"))
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return text, tuple(fixes)
    rewriter = _Rewrite(image_path, image_size)
    before = ast.dump(tree)
    tree = ast.fix_missing_locations(rewriter.visit(tree))
    if ast.dump(tree) != before:
        text = ast.unparse(tree)
    return text, (*fixes, *rewriter.fixes)
