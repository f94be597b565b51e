"""Names that mean the input image or its path (`img`, `input_image`, `img_path`) where a snippet takes them for given.

What such a name is bound to follows from what the snippet does with it: `img.crop(...)` wants a Pillow image,
`img.shape` an array, `Image.open(img)` a path. Where the uses disagree or say nothing, nothing is bound.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence

from thyme.sandbox.uses import Use, uses_of, words

_NOUNS = frozenset(("img", "image", "im", "picture", "photo", "pic"))
_INPUT = frozenset(("input", "original", "orig", "source", "src"))
_WORDS = frozenset(("the", "my", "full", "raw", "user", "given", "whole"))
_PIL_WORDS, _ARRAY_WORDS = frozenset(("pil",)), frozenset(("cv", "cv2", "np", "numpy", "array", "arr"))
_PATH_WORDS = frozenset(("path", "file", "filename", "filepath", "fname", "location", "url"))
_ANY_FILE = frozenset(("filename", "file_path", "filepath", "file_name", "fname"))
"""Said of an image only where one is read from it."""
_JOINED = {
    "imgpath": "img_path",
    "imagepath": "image_path",
    "inputpath": "input_path",
    "inputimage": "input_image",
    "inputimg": "input_img",
    "imagefile": "image_file",
    "imgfile": "img_file",
    "originalimage": "original_image",
    "inputimagepath": "input_image_path",
    "imgarray": "img_array",
    "imagearray": "image_array",
    "path_to_image": "image_path",
    "path_to_img": "img_path",
    "path_to_the_image": "image_path",
}

_PIL = words(
    "crop save convert rotate thumbnail filter paste getpixel putpixel show width height mode getbbox histogram load "
    "transform quantize getdata info getbands putalpha alpha_composite point entropy getcolors getextrema getchannel "
    "n_frames reduce resize verify getexif _getexif palette putdata draft seek tell"
)
_ARRAY = words(
    "shape dtype ndim astype reshape mean max min sum std var flatten ravel T any all argmax argmin clip nonzero flat "
    "itemsize nbytes tolist fill sort cumsum swapaxes squeeze item"
)
_EITHER = frozenset(("size", "copy", "transpose", "tobytes"))
IMAGE_ATTRIBUTES = _PIL | _ARRAY | _EITHER
"""Of Pillow's images and of arrays."""
_SAME_IN_ANY_ORDER = frozenset(
    ("shape", "dtype", "ndim", "itemsize", "nbytes", "mean", "max", "min", "sum", "std", "var")
)
"""What does not depend on whether red or blue comes first, given without an axis."""
_IMAGE_READERS = words(
    "Image.open PIL.Image.open cv2.imread cv.imread plt.imread mpimg.imread imageio.imread io.imread skimage.io.imread "
    "imread"
)
_PATH_TAKERS = words("open Path pathlib.Path os.stat os.path.join")
_WRITERS = (".save", ".savefig", "imwrite", ".imsave")
_PIL_TAKERS = tuple(
    words(
        "ImageDraw. ImageOps. ImageEnhance. ImageChops. ImageStat. Image.blend Image.merge Image.composite "
        "Image.alpha_composite"
    )
)


def is_input_name(name: str) -> bool:
    return _kind(name) is not None


def binding(name: str, tree: ast.AST, image_path: str, within: ast.AST | None = None) -> str | None:
    """The statement that binds `name` to the input, None where its uses do not say to what.

    Args:
        name: read in the snippet and defined nowhere.
        tree: the snippet.
        image_path: path of the input image.
        within: look only at what happens in this part; None looks at all.
    """
    kind = _kind(name)
    if kind is None or not image_path:
        return None
    evidence = _evidence(name, within if within is not None else tree)
    if "unknown" in evidence:
        return None
    if kind in ("path", "file") or evidence & {"path", "reader"}:
        plain = evidence <= {"path", "reader", "neutral"} and kind in ("path", "file", "image")
        enough = evidence & ({"reader"} if kind == "file" else {"path", "reader"})
        return f"{name} = {image_path!r}" if plain and enough else None
    as_array = bool(evidence & {"array", "shape"})
    if as_array and "pil" in evidence:
        return None
    opened = f"__import__('PIL.Image', fromlist=['open']).open({image_path!r})"
    if not as_array and kind != "array":
        return f"{name} = {opened}" if evidence & {"pil", "size"} or kind == "pil" else None
    if kind == "pil" or (kind == "array" and "pil" in evidence):
        return None
    mentioned = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    if mentioned & {"cv2", "cv"}:
        missing = f"if {name} is None:\n    del {name}\n    raise OSError('there is no input image')"
        return f"{name} = __import__('cv2').imread({image_path!r})\n{missing}"
    if "array" in evidence and not mentioned & {"Image", "plt", "skimage"}:
        return None  # red first or blue first?
    return f"{name} = __import__('numpy').array({opened})"


def _kind(name: str) -> str | None:
    """What the name alone says: "image", "pil", "array", "path", "file" (a path, but of an image only where it is read
    as one), None for the name of something else."""
    lower = name.lower()
    if name not in (lower, name.upper()) and lower not in _JOINED and "_" not in name:
        return None  # Image is a module
    if lower in _ANY_FILE:
        return "file"
    words = _JOINED.get(lower, lower).split("_")
    if words[-1] in _PATH_WORDS:
        of = {word for word in words if word not in _PATH_WORDS}
        if not of & (_NOUNS | _INPUT) or not of <= _NOUNS | _INPUT | _WORDS:
            return None
        return "path" if of & _NOUNS and "path" in words[-1] else "file"
    if not set(words) & _NOUNS or not set(words) <= _NOUNS | _INPUT | _WORDS | _PIL_WORDS | _ARRAY_WORDS:
        return None
    pil, array = set(words) & _PIL_WORDS, set(words) & _ARRAY_WORDS
    if pil and array:
        return None
    return "pil" if pil else "array" if array else "image"


def _evidence(name: str, tree: ast.AST) -> set[str]:
    """What the uses of `name`, and of plain copies of it, say: "pil", "size" (rather Pillow), "array", "shape" (an
    array in any order of colours), "reader" (a path that an image is read from), "path", "neutral" or "unknown"."""
    names, found = {name}, set[str]()
    uses: dict[str, list[Use]] = {}
    for _ in range(3):  # a copy of a copy of a copy
        uses = uses_of(tree, names)
        copies = {copy for of_name in uses.values() for use in of_name if (copy := _copied_to(use))}
        if copies <= names:
            break
        names |= copies
    is_path = _kind(name) in ("path", "file")
    for of_name in uses.values():
        found |= {_evidence_of(use, is_path) for use in of_name}
    return found


def _copied_to(use: Use) -> str | None:
    """`b` of `b = a` and of `b = a.copy()`."""
    around: Sequence[ast.AST] = use.around
    value: ast.expr = use.node
    if use.attribute == "copy" and len(around) > 2 and isinstance(around[1], ast.Call) and around[1].func is around[0]:
        value, around = around[1], around[2:]
    assign = around[0]
    if isinstance(assign, ast.Assign) and assign.value is value and len(assign.targets) == 1:
        target = assign.targets[0]
        return target.id if isinstance(target, ast.Name) else None
    return None


def _evidence_of(use: Use, is_path: bool) -> str:
    parent = use.around[0]
    if use.attribute is not None:
        return _evidence_of_attribute(use, use.attribute, is_path)
    if use.call is not None:
        return _evidence_of_call(*use.call, is_path)
    if use.is_called:
        return "unknown"
    if use.is_indexed:
        assert isinstance(parent, ast.Subscript)
        return "array" if isinstance(parent.slice, (ast.Slice, ast.Tuple)) and not is_path else "unknown"
    if isinstance(parent, ast.BinOp):
        other = parent.right if parent.left is use.node else parent.left
        if isinstance(other, (ast.JoinedStr, ast.Constant)) and not isinstance(
            getattr(other, "value", 0), (int, float)
        ):
            return "path" if isinstance(parent.op, ast.Add) else "neutral"
        return "unknown" if is_path else "array"
    if isinstance(parent, ast.Compare):
        ordered = any(isinstance(op, (ast.Lt, ast.LtE, ast.Gt, ast.GtE)) for op in parent.ops)
        return "array" if ordered and not is_path else "neutral"
    if isinstance(parent, (ast.For, ast.comprehension, ast.Starred)):
        return "unknown"
    return "path" if is_path else "neutral"


def _evidence_of_attribute(use: Use, attribute: str, is_path: bool) -> str:
    call = use.around[1] if len(use.around) > 1 else None
    is_call = isinstance(call, ast.Call) and call.func is use.around[0]
    has_arguments = isinstance(call, ast.Call) and is_call and bool(call.args or call.keywords)
    if is_path:
        return "path" if hasattr(str, attribute) else "unknown"
    if attribute == "split":
        return "path" if has_arguments else "pil"
    if attribute == "format":
        return "path" if is_call else "pil"
    if attribute in _PIL:
        return "pil"
    if attribute in _ARRAY:
        return "shape" if attribute in _SAME_IN_ANY_ORDER and not has_arguments else "array"
    if attribute in _EITHER:
        return "size" if attribute == "size" else "neutral"
    return "path" if hasattr(str, attribute) else "unknown"


def _evidence_of_call(function: str, position: int, is_path: bool) -> str:
    if function in _IMAGE_READERS:
        return "reader" if position <= 0 else "unknown"
    if function in _PATH_TAKERS or function.startswith("os.path."):
        return "path" if position <= 0 or function == "os.path.join" else "unknown"
    if is_path:
        takes_images = function.startswith(("cv2.", "cv.", "Image.", *_PIL_TAKERS))
        return "unknown" if takes_images or function.endswith(_WRITERS) else "path"
    if function.startswith(_PIL_TAKERS) or function.endswith((".paste", ".alpha_composite")):
        return "pil"
    if function in ("np.array", "np.asarray", "numpy.array", "numpy.asarray"):
        return "size"
    if function.startswith(("cv2.", "cv.")) or function == "Image.fromarray":
        return "array"
    return "neutral"
