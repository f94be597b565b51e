"""Slips of the kind models make, as data: what must run after repair, and what must not be touched.

The input image is 120x80 at /data/photo.jpg. Expected is the stripped stdout, and the sizes of the returned images.
"""

# One case a line, however long.
# ruff: noqa: E501
from __future__ import annotations

from typing import NamedTuple


class Slip(NamedTuple):
    kind: str
    """Kind of the fix that must be reported."""
    code: str
    stdout: str = ""
    sizes: tuple[tuple[int, int], ...] = ()


REPAIRED: list[Slip] = [
    # wrapping
    Slip("wrapping", "```python\nprint(1)\n```", "1"),
    Slip("wrapping", "```\nprint(1)\n```", "1"),
    Slip("wrapping", "```py\nprint(1)", "1"),
    Slip("wrapping", "print(1)\n```", "1"),
    Slip("wrapping", "Here is the code:\n```python\nprint(1)\n```\nIt prints one.", "1"),
    Slip("wrapping", "<code>\nprint(1)\n</code>", "1"),
    Slip("wrapping", "<code>\n```python\nprint(1)\n```\n</code>", "1"),
    Slip("wrapping", "python3\nx = 1\n  print(x)", "1"),
    Slip("wrapping", "`print(1)`", "1"),
    Slip("wrapping", "~~~python\nprint(1)\n~~~", "1"),
    Slip("wrapping", ">>> x = 2\n>>> print(x)\n2", "2"),
    Slip("wrapping", ">>> for i in range(2):\n...     print(i)\n...\n0\n1", "0\n1"),
    Slip("wrapping", "In [1]: x = 3\nIn [2]: for i in [x]: print(i)\nOut[2]: 3", "3"),
    Slip("wrapping", "%matplotlib inline\nprint(1)", "1"),
    Slip("wrapping", "!pip install numpy\nprint(1)", "1"),
    Slip("wrapping", "x = 1\\nprint(x)", "1"),
    # indentation
    Slip("indent", "    x = 1\n    print(x)", "1"),
    Slip("indent", "  x = 1\nprint(x)", "1"),
    Slip("indent", "x = 1\n    y = 2\n    print(x + y)", "3"),
    Slip("indent", "x = 1\n  print(x)", "1"),
    Slip("indent", "if True:\nprint(1)", "1"),
    Slip("indent", "for i in range(2):\nprint(i)\n\nprint('end')", "0\n1\nend"),
    Slip("indent", "if False:\nprint(1)\nelse:\nprint(2)", "2"),
    Slip("indent", "def f():\n    x = 1\n   \treturn x\nprint(f())", "1"),
    Slip("indent", "if True:\n    x = 1\n     \n\ty = 2\n    print(x + y)", "3"),
    Slip("indent", "\tx = 1\n\tprint(x)", "1"),
    Slip("indent", "class A:\n    def f(self):\n        return 1\n     def g(self):\n        return 2\nprint(A().f() + A().g())", "3"),
    # characters
    Slip("characters", "print(\u201chi\u201d)", "hi"),
    Slip("characters", "print(\u2018hi\u2019)", "hi"),
    Slip("characters", "x\u00a0=\u00a01\nprint(x)", "1"),
    Slip("characters", "print\uff081\uff0c2\uff09", "1 2"),
    Slip("characters", "print(3 \u2212 1)", "2"),
    Slip("characters", "print(3 \u00d7 2)", "6"),
    Slip("characters", "print(1 &lt; 2)", "True"),
    Slip("characters", "x = 5\nif x \u2265 5:\n    print('big')", "big"),
    Slip("characters", "\u200bprint(1)", "1"),
    Slip("characters", "print('a\u2014b' \u2260 'x')", "True"),
    # syntax
    Slip("colon", "for i in range(2)\n    print(i)", "0\n1"),
    Slip("colon", "if True\n    print(1)", "1"),
    Slip("colon", "def f(x)\n    return x\nprint(f(1))", "1"),
    Slip("colon", "if True:  # yes\n    print(1)\nelse  # no\n    print(2)", "1"),
    Slip("colon", "while False\n    pass\nprint(1)", "1"),
    Slip("bracket", "print(len('abc')", "3"),
    Slip("bracket", "x = max(1, 2\nprint(x)", "2"),
    Slip("bracket", "x = [1, 2\nprint(x)", "[1, 2]"),
    Slip("bracket", "print(1))", "1"),
    Slip("bracket", "x = (1, [2, 3)\nprint(x)", "(1, [2, 3])"),
    Slip("bracket", "if (len('a') == 1:\n    print(1)\nprint(2)", "1\n2"),
    Slip("print", "print 'a'", "a"),
    Slip("print", "x = 1\nprint x, 2", "1 2"),
    Slip("operator", "x = 3\nif x = 3:\n    print(1)", "1"),
    Slip("operator", "if True && True:\n    print(1)", "1"),
    Slip("operator", "if False || True:\n    print(1)", "1"),
    Slip("operator", "x = 1\nx++\nprint(x)", "2"),
    Slip("operator", "if False:\n    pass\nelse if True:\n    print(1)", "1"),
    Slip("operator", "if 1 <> 2:\n    print(1)", "1"),
    Slip("number", "print(007)", "7"),
    Slip("except", "try:\n    1/0\nexcept ZeroDivisionError, e:\n    print(e)", "division by zero"),
    Slip("path", "p = /data/photo.jpg\nprint(p)", "/data/photo.jpg"),
    # names
    Slip("import", "print(np.zeros(2).sum())", "0.0"),
    Slip("import", "print(math.floor(1.5))", "1"),
    Slip("import", "print(os.path.basename(image_path))", "photo.jpg"),
    Slip("import", "print(json.dumps([1]))", "[1]"),
    Slip("import", "im = Image.open(image_path)\nprint(im.size)", "(120, 80)"),
    Slip("import", "def f():\n    return [math.sqrt(x) for x in (4,)]\nprint(f())", "[2.0]"),
    Slip("import", "print(Counter('aab').most_common(1))", "[('a', 2)]"),
    Slip("import", "print(cv2.imread(image_path).shape)", "(80, 120, 3)"),
    Slip("import", "print(sqrt(4), pi > 3)", "2.0 True"),
    Slip("import", "x = true\nprint(x)", "True"),
    Slip("import", "print(Path('a/b').name)", "b"),
    Slip("import", "im = Image.open(image_path)\nd = ImageDraw.Draw(im)\nprint(ImageOps.mirror(im).size)", "(120, 80)"),
    # run-time leniency
    Slip("path", "from PIL import Image\nprint(Image.open('/wrong/place.jpg').size)", "(120, 80)"),
    Slip("path", "import cv2\nprint(cv2.imread('image.png').shape)", "(80, 120, 3)"),
    Slip("path", "image_path = '/mnt/data/image.jpg'\nfrom PIL import Image\nprint(Image.open(image_path).size)", "(120, 80)"),
    Slip("path", "from PIL import Image\nImage.open(image_path).save('/srv/user/out.png')", "", ((120, 80),)),
    Slip("crop", "from PIL import Image\nImage.open(image_path).crop((100, 60, 300, 300)).save('a.png')", "", ((20, 20),)),
    Slip("crop", "from PIL import Image\nImage.open(image_path).crop((-10, -10, 10, 10)).save('a.png')", "", ((10, 10),)),
    Slip("crop", "from PIL import Image\nImage.open(image_path).crop((50, 40, 10, 20)).save('a.png')", "", ((40, 20),)),
    Slip("float", "from PIL import Image\nim = Image.open(image_path)\nim.resize((im.width * 1.5, im.height / 2)).save('a.png')", "", ((180, 40),)),
    Slip("float", "import cv2\nim = cv2.imread(image_path)\nprint(cv2.resize(im, (60.0, 40.0)).shape)", "(40, 60, 3)"),
    Slip("float", "from PIL import Image\nprint(Image.new('RGB', (3.0, 4.0)).size)", "(3, 4)"),
    Slip("float", "import cv2, numpy as np\nim = np.zeros((9, 9, 3), 'u1')\ncv2.rectangle(im, (1.0, 1.0), (5.0, 5.0), (255, 0, 0), 1)\nprint(int(im.max()))", "255"),
    Slip("mode", "from PIL import Image\nImage.open(image_path).convert('RGBA').save('a.jpg')", "", ((120, 80),)),
    Slip("mode", "from PIL import Image\nImage.new('P', (5, 6)).save('a.jpeg')", "", ((5, 6),)),
    Slip("format", "from PIL import Image\nImage.new('RGB', (5, 6)).save('a.jpg', 'JPG')", "", ((5, 6),)),
    Slip("removed", "from PIL import Image\nImage.open(image_path).resize((8, 8), Image.ANTIALIAS).save('a.png')", "", ((8, 8),)),
    Slip("removed", "import numpy as np\nprint(np.float(1))", "1.0"),
    Slip("removed", "from PIL import Image, ImageDraw\nprint(len(ImageDraw.Draw(Image.new('L', (9, 9))).textsize('a')))", "2"),
    Slip("font", "from PIL import ImageFont\nprint(ImageFont.truetype('arial.ttf', 20).size)", "20"),
    Slip("show", "from PIL import Image\nImage.open(image_path).show()", "", ((120, 80),)),
    Slip("show", "import cv2\ncv2.imshow('w', cv2.imread(image_path))\ncv2.waitKey(0)", "", ((120, 80),)),
    Slip("show", "from PIL import Image\nim = Image.open(image_path)\nim.rotate(90, expand=True)", "", ((80, 120),)),
    Slip("show", "6 * 7", "42"),
    Slip("show", "from PIL import Image\ndisplay(Image.open(image_path))", "", ((120, 80),)),
]  # fmt: skip

# What could be read in two ways, or is only nearly right: the error stands.
NOT_REPAIRED: list[tuple[str, str]] = [
    ("cut-off tuple", "box = (10, 20, 30"),
    ("cut-off call with a number", "x = int(12"),
    ("cut-off string", "print('hello"),
    ("cut-off triple string", 's = """abc'),
    ("cut-off list", "x = [1, 2, 3"),
    ("cut-off dictionary", "d = {'a': 1,"),
    ("cut-off argument list", "print(1,"),
    ("cut-off expression", "x = 3 +"),
    ("cut-off assignment", "x ="),
    ("cut-off header", "for i in"),
    ("cut-off crop", "im = Image.open(image_path)\nim.crop((10, 20, 300"),
    ("body of unknown extent", "for i in range(3):\nprint(i)\nprint('done')"),
    ("indent halfway between two levels", "def f():\n    x = 1\n  return x\nprint(f())"),
    ("prose", "First I will open the image and look at it."),
    ("two expressions in a row", "x = 1 2"),
    ("missing comma", "x = [1 2]"),
    ("keyword as a name", "class = 3"),
    ("return outside", "return 5"),
    ("unknown token", "x = $5"),
    ("assignment to a call", "f() = 1"),
    ("misspelled keyword", "fro i in range(3):\n    print(i)"),
    ("misspelled name", "value = 1\nprint(vlaue)"),
    ("misspelled builtin", "pritn(1)"),
    ("misspelled attribute", "import math\nmath.sqr(2)"),
    ("crop of no area", "from PIL import Image\nImage.open(image_path).crop((10, 10, 10, 50))"),
    ("crop outside the image", "from PIL import Image\nImage.open(image_path).crop((500, 500, 600, 600))"),
    ("second missing image", "from PIL import Image\nImage.open('a.jpg')\nImage.open('b.jpg')"),
    ("missing text file", "open('notes.txt').read()"),
    ("undefined name nobody knows", "print(detector.run())"),
    ("division by zero", "1 / 0"),
    ("wrong type", "'a' + 1"),
    ("missing module", "import torch_geometric_x"),
]
