"""Code of a model that whoever reads it without running it must not stumble over: it parses, and leads nowhere."""

LONG_SUM = " + ".join(["1"] * 1_500)
"""Parsed into a tree that is deeper than Python's stack."""

CODES = (
    "box = (1, 2, 3)\nx = box[5]",
    "x = (1, 2)[-3]",
    "x = (1, 2, 3)[0.5:2]",
    "x = (1, 2, 3)['a':]",
    "x = ()[0]",
    f"x = {LONG_SUM}",
    f"print({LONG_SUM})",
    f"img.crop((0, 0, 10, {LONG_SUM}))",
    f"def f():\n    return {LONG_SUM}",
    "x = 1e999\nwidth = int(x)",
    f"x = {'9' * 400}\ny = x * 1.5\nz = x / 3",
    "x = 1 / 0\ny = 1 % 0\nz = 5 // 0.0",
    "x = max()\ny = min(())\nz = round((1, 2))\nw = abs('a')\nv = int((1,))",
    'img = Image.open("image.png").crop((0, 0, 1e999, 1e999))\nwidth, height = img.size',
    f'img = Image.open("image.png").crop((0.5, 0, 10, {"9" * 400}))\nx = img.size',
    f'img = Image.open("image.png").rotate({"9" * 400})',
    "img = Image.open(*args, **more).crop(*box)\nx = img[::2, 3]",
    "x = -'a'\ny = -(1, 2)\nz = 'a' % 3",
    "a, (b, *c), d.e, f[0] = 1, (2, 3), 4, 5",
)
