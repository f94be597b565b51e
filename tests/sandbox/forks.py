"""Sessions to fork, as data: what was run before, and what a fork and a session in which all of it ran again must give
alike next. And how they are compared, in whatever mode."""

# One case a line, however long.
# ruff: noqa: E501
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image

from thyme.sandbox import Sandbox, SandboxResult


class Story(NamedTuple):
    name: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    """Run in the fork, each in turn."""
    live: bool = True
    """False where something cannot be copied: the code runs again everywhere."""


# A table: one story a line.
# fmt: off
STORIES = [
    Story("nothing was run", (), ("print(sorted(globals()))",)),
    Story("a number", ("x = 41",), ("x += 1\nprint(x)", "print(x)")),
    Story("lists that share", ("a = [1]; b = a",), ("a.append(2); print(b, a is b)",)),
    Story(
        "a closure",
        (
            "def make():\n    n = 0\n    def f():\n        nonlocal n\n        n += 1\n        return n\n    return f\nf = make(); f()",
        ),
        ("print(f(), f())",),
    ),
    Story(
        "a class with objects",
        ("class P:\n    n = 0\n    def __init__(self, v): self.v = v; P.n += 1\np = P(3)",),
        ("q = P(p.v + 1); print(P.n, q.v, isinstance(p, P))",),
    ),
    Story(
        "a generator half-way",
        ("def g():\n    for i in range(9): yield i * i\nit = g(); next(it); next(it)",),
        ("print(list(it))",),
    ),
    Story(
        "iterators",
        ("import itertools\nc = itertools.count(5); next(c); z = iter('abcdef'); next(z)",),
        ("print(next(c), list(z))",),
    ),
    Story(
        "random numbers",
        ("import random, numpy as np\na = random.random(); b = np.random.rand()",),
        ("print(random.random(), np.random.rand(), random.getrandbits(70))",),
    ),
    Story(
        "generators of random numbers",
        ("import random, numpy as np\nr = random.Random(3); g = np.random.default_rng(3); r.random(); g.normal()",),
        ("print(r.random(), g.normal(), g.integers(99))",),
    ),
    Story(
        "a big array",
        ("import numpy as np\na = np.arange(6_000_000).reshape(2000, 3000)",),
        ("a[5] += 1; print(a.sum(), a[5, :3], a.flags.owndata)",),
    ),
    Story(
        "arrays that were given back",
        ("import numpy as np\na = [np.ones(1 << 19) * i for i in range(8)]; del a[1::2]; keep = a[1][:3].copy()",),
        ("print([float(x[0]) for x in a], keep)",),
    ),
    Story(
        "many small objects",
        ("d = {str(i): [i] * 3 for i in range(60_000)}",),
        ("d['x'] = 1; print(len(d), d['59999'], sum(v[0] for k, v in d.items() if k != 'x'))",),
    ),
    Story(
        "a view of an array",
        ("import numpy as np\na = np.zeros((4, 4)); v = a[1:3, 1:3]; v += 1",),
        ("v *= 5; print(a.sum(), a[1, 1], v.base is a)",),
    ),
    Story(
        "a crop of the image",
        ("im = Image.open(image_path).crop((10, 20, 40, 50))\nim.save('a.png')",),
        ("im.rotate(90).save('b.png')", "print(sorted(os.listdir('.')), Image.open('a.png').size)"),
    ),
    Story(
        "an image that is not read yet",
        ("im = Image.open(image_path)",),
        ("print(im.size, im.getpixel((3, 4)))\nim.crop((0, 0, 9, 9)).save('c.png')",),
    ),
    Story(
        "a crop of a crop",
        (
            "a = Image.open(image_path).crop((5, 5, 60, 60)); a.save('a.png')",
            "b = a.crop((1, 1, 30, 30)); b.save('b.png')",
        ),
        ("b.crop((1, 1, 9, 9)).save('c.png')", "print(sorted(os.listdir('.')))"),
    ),
    Story(
        "cv2",
        ("import cv2\nim = cv2.imread(image_path); g = cv2.cvtColor(im, cv2.COLOR_BGR2GRAY)",),
        ("cv2.imwrite('g.png', cv2.GaussianBlur(g, (3, 3), 1)); print(g.shape, int(g.sum()))",),
    ),
    Story(
        "files and folders",
        (
            "os.makedirs('d/e'); open('d/e/f.txt', 'w').write('one'); open('/tmp/t', 'w').write('two'); open('/mnt/data/u', 'w').write('three')",
        ),
        (
            "print(open('d/e/f.txt').read(), open('/tmp/t').read(), open('/mnt/data/u').read())\nopen('d/e/f.txt', 'a').write('!')",
            "print(open('d/e/f.txt').read(), sorted(os.walk('d')))",
        ),
    ),
    Story(
        "a file beside the image",
        ("open(os.path.dirname(image_path) + '/beside', 'w').write('x')",),
        ("print(open(os.path.dirname(image_path) + '/beside').read())",),
    ),
    Story(
        "files that were deleted",
        ("open('a', 'w').close(); open('b', 'w').close(); os.remove('a'); os.mkdir('c'); os.rmdir('c')",),
        ("print(os.listdir('.'))",),
    ),
    Story(
        "another working folder",
        ("os.mkdir('/tmp/w'); os.chdir('/tmp/w'); open('x', 'w').write('1')",),
        ("print(os.getcwd(), os.listdir('.'), open('x').read())",),
    ),
    Story(
        "a file open for reading",
        ("open('a', 'w').write('abcdef'); f = open('a'); f.read(2)",),
        ("print(f.read(), f.closed)",),
    ),
    Story(
        "a file open for writing",
        ("f = open('a', 'w'); f.write('abc'); f.flush()",),
        ("f.write('def'); f.close(); print(open('a').read())",),
    ),
    Story(
        "text that is not written out yet",
        ("f = open('a', 'w'); n = f.write('abc')",),
        ("f.close(); print(open('a').read())",),
    ),
    Story(
        "a file open to append",
        ("open('a', 'w').write('x'); f = open('a', 'ab'); f.write(b'y'); f.flush()",),
        ("f.write(b'z'); f.close(); print(open('a').read())",),
    ),
    Story("a duplicate of standard output", ("d = os.dup(1)",), ("os.write(d, b'there'); print()",)),
    Story(
        "an open file that was deleted",
        ("import tempfile\nf = tempfile.TemporaryFile('w+'); f.write('kept'); f.flush()",),
        ("f.seek(0); print(f.read())",),
        live=False,
    ),
    Story(
        "a mapped file",
        ("import mmap\nopen('m', 'wb').write(b'x' * 8192); m = mmap.mmap(os.open('m', os.O_RDWR), 0)",),
        ("m[:3] = b'abc'; print(open('m', 'rb').read()[:5])",),
        live=False,
    ),
    Story(
        "shared memory of its own",
        ("import mmap\nm = mmap.mmap(-1, 8192); m[:3] = b'abc'",),
        ("print(m[:4])",),
        live=False,
    ),
    Story(
        "private memory of its own",
        ("import mmap\nm = mmap.mmap(-1, 8192, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); m[:3] = b'abc'",),
        ("m[3:4] = b'd'; print(m[:5])",),
    ),
    Story("an error half-way", ("x = 1\ny = 2\nraise ValueError('stop')", "z = x + y"), ("print(x, y, z)", "1 / 0")),
    Story("a syntax error", ("x = 5", "print('open"), ("print(x)",)),
    Story(
        "an exception kept",
        ("try:\n    [][1]\nexcept IndexError as e:\n    kept = e",),
        ("print(repr(kept), kept.__traceback__.tb_lineno)",),
    ),
    Story(
        "imports",
        ("import json, collections, re as regex\nfrom math import pi",),
        ("print(json.dumps([pi]), regex.match('a+', 'aab').group(), collections.Counter('aab'))",),
    ),
    Story(
        "a module that was changed",
        ("import math, json\nmath.tau = 6; json.extra = [1]\nnp.set_printoptions(precision=2)",),
        ("import math as m, json as j\nprint(m.tau, j.extra, np.array([1.23456]))",),
    ),
    Story(
        "caches and registries",
        (
            "import functools, re\n@functools.lru_cache\ndef f(n):\n    return n * n\nf(3); f(4)\np = re.compile('(a|b)+c')",
        ),
        ("f(3); print(f.cache_info(), p.match('abac').span())",),
    ),
    Story("a decimal context", ("import decimal\ndecimal.getcontext().prec = 7",), ("print(decimal.Decimal(1) / 3)",)),
    Story(
        "signals and recursion",
        ("import signal, sys\nsys.setrecursionlimit(400)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)",),
        ("print(sys.getrecursionlimit(), signal.getsignal(signal.SIGTERM))\ndef f(): f()\nf()",),
    ),
    Story(
        "a umask", ("os.umask(0o22)",), ("open('a', 'w').close(); print(oct(os.stat('a').st_mode), oct(os.umask(0)))",)
    ),
    Story(
        "a lower limit",
        (
            "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\nimport signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)",
        ),
        ("print(resource.getrlimit(resource.RLIMIT_FSIZE))\nopen('a', 'wb').write(b'x' * 2000)",),
    ),
    Story("deep frames before", ("def f(n): return 0 if n == 0 else 1 + f(n - 1)\nprint(f(900))",), ("print(f(901))",)),
    Story(
        "drawing with text",
        ("from PIL import ImageDraw\nim = Image.new('RGB', (60, 30)); d = ImageDraw.Draw(im); d.text((2, 2), 'abc')",),
        ("d.line((0, 0, 59, 29), 'red'); im.save('t.png')",),
    ),
    Story(
        "shown images",
        ("Image.new('RGB', (5, 5), 'red').show()",),
        ("Image.new('RGB', (6, 6), 'blue').show()", "print(sorted(os.listdir('.')))"),
    ),
    Story(
        "an image saved and named later",
        ("Image.new('RGB', (7, 7), 'green').save('g.png')",),
        ("processed_path = 'g.png'\nprint(processed_path)", "print('./g.png')"),
    ),
    Story(
        "saved outside of the scratch",
        ("Image.new('RGB', (7, 7)).save('/elsewhere/out.png')",),
        ("print(Image.open('/elsewhere/out.png').size)",),
    ),
    Story(
        "an image under a wrong name",
        ("a = Image.open('input_image.jpg').size",),
        ("print(a, Image.open('input_image.jpg').size)\nImage.open('other.jpg')",),
    ),
    Story(
        "weak references and cycles",
        ("import weakref, gc\nclass N: pass\na = N(); a.me = a; w = weakref.ref(a)",),
        ("print(w() is a); del a; gc.collect(); print(w())",),
    ),
    Story(
        "a context manager left open",
        (
            "import contextlib, io\ns = contextlib.redirect_stdout(io.StringIO()); buffer = s.__enter__(); print('inside')",
        ),
        ("import sys\nprint(type(sys.stdout).__name__, repr(buffer.getvalue()))",),
    ),
    Story(
        "bytes and text",
        ("t = 'straße ' * 5000; b = bytearray(range(256)) * 3000",),
        ("b[5] = 0; print(len(t), hash(t) == hash('straße ' * 5000), sum(b))",),
    ),
    Story(
        "an async loop's coroutine",
        ("async def c(): return 5\nco = c()",),
        ("try:\n    co.send(None)\nexcept StopIteration as s:\n    print(s.value)",),
    ),
]
# fmt: on


def told(result: SandboxResult) -> tuple:
    """What the model would see of it."""
    images = [(image.size, image.tobytes()) for image in result.images]
    return result.status, result.stdout, result.error, result.fixes, images


def differences(story: Story, live: Sandbox, again: Sandbox, image: Image.Image) -> Iterator[str]:
    """What is not as it must be: a fork gives what a session gives in which all runs again, twice, and the session that
    was forked is none the worse.

    Args:
        story: what is run.
        live: forks.
        again: runs code again for a fork.
        image: the input.
    """
    forks_live = story.live and any(layer.name == "live fork" and layer.ok for layer in live.layers())
    with (
        live.session(image, "/data/photo.jpg", seed=3) as parent,
        again.session(image, "/data/photo.jpg", seed=3) as old,
    ):
        for code in story.before:
            parent.run(code), old.run(code)
        one, other = parent.fork(2)
        (expected_in,) = old.fork()
        with one, other, expected_in:
            if story.before and (one.fork_detail == "") != forks_live:
                yield f"live: {one.fork_detail!r}"
            expected = [told(expected_in.run(code)) for code in story.after]
            for name, session in (("first", one), ("second", other), ("parent", parent)):
                given = [told(session.run(code)) for code in story.after]
                if given != expected:
                    yield f"{name}: {given!s:.600} in place of {expected!s:.600}"
