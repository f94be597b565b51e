"""Where the scratch lies at the paths the model was told: by the kernel where a child has a root of its own, by patched
functions elsewhere. What a snippet does with paths comes to the same, and no session sees another's files."""

# One case a line, however long.
# ruff: noqa: E501
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.sandbox.host import Host, check_crop, eventually, picture, without_python
from thyme.sandbox import Sandbox, SandboxConfig, Status
from thyme.sandbox.paths import folder_of_image, place_of
from thyme.sandbox.root import BaseRoot
from thyme.sandbox.root import Image as InputImage

_LIMITS = {"workers": 2, "memory_mib": 256, "timeout_s": 20.0}


@pytest.fixture(scope="module")
def mounted() -> Iterator[Sandbox]:
    with Sandbox(SandboxConfig(**_LIMITS)) as sandbox:
        if not is_mounted(sandbox):
            pytest.skip("this machine gives no mount namespace")
        yield sandbox


@pytest.fixture(scope="module")
def forked_on_demand() -> Iterator[Sandbox]:
    """No child is forked ahead: each knows its image when it makes its root."""
    with Sandbox(SandboxConfig(**_LIMITS), _off=frozenset({"parking"})) as sandbox:
        if not is_mounted(sandbox):
            pytest.skip("this machine gives no mount namespace")
        yield sandbox


@pytest.fixture(scope="module")
def patched() -> Iterator[Sandbox]:
    with Sandbox(SandboxConfig(**_LIMITS), _off=frozenset({"namespaces"})) as sandbox:
        yield sandbox


def is_mounted(sandbox: Sandbox) -> bool:
    return next((layer.ok for layer in sandbox.layers() if layer.name == "private root"), False)


# What must come to the same however paths are arranged: (code, printed).
SAME = {
    "where it is": (
        "import os, pathlib\nprint(os.getcwd(), pathlib.Path.cwd(), temp_output_dir)\nos.chdir('/tmp')\nprint(os.getcwd())\n"
        "os.chdir(os.path.dirname(image_path))\nprint(os.getcwd(), os.path.abspath('x'))",
        "/mnt/data/temp_processed_images /mnt/data/temp_processed_images /mnt/data/temp_processed_images/\n/tmp\n"
        "/data/in /data/in/x\n",
    ),
    "the input image": (
        "import os, pathlib, shutil, io\nimport numpy as np, cv2\nfrom PIL import Image\n"
        "p = pathlib.Path(image_path)\n"
        "print(os.path.exists(image_path), os.path.isfile(image_path), p.exists(), p.resolve(), os.path.realpath(image_path))\n"
        "print(os.path.islink(image_path), os.access(image_path, os.R_OK), os.stat(image_path).st_size == len(p.read_bytes()))\n"
        "print(Image.open(image_path).size, cv2.imread(image_path).shape, Image.open(p).size)\n"
        "shutil.copy(image_path, 'c.png'); shutil.copyfile(image_path, '/tmp/d.png'); shutil.copy2(p, '/mnt/data')\n"
        "print(Image.open('c.png').size, Image.open('/tmp/d.png').size, sorted(os.listdir('/mnt/data')))",
        "True True True /data/in/photo.jpg /data/in/photo.jpg\nFalse True True\n(120, 80) (80, 120, 3) (120, 80)\n"
        "(120, 80) (120, 80) ['photo.jpg', 'temp_processed_images']\n",
    ),
    "temporary files": (
        "import os, tempfile\nprint(tempfile.gettempdir())\n"
        "with tempfile.NamedTemporaryFile(suffix='.png') as f:\n    f.write(b'1'); print(os.path.dirname(f.name), os.path.exists(f.name))\n"
        "print(os.path.exists(f.name), os.listdir('/tmp'))\n"
        "f = tempfile.NamedTemporaryFile(delete=False); f.close(); os.unlink(f.name)\n"
        "with tempfile.TemporaryDirectory() as d:\n    open(d + '/x', 'w').close(); print(os.path.dirname(d), os.listdir(d))\n"
        "print(os.path.exists(d), os.listdir('/tmp'))\n"
        "with tempfile.TemporaryFile() as f: f.write(b'1')\nh, n = tempfile.mkstemp(); os.close(h); os.remove(n); print(os.listdir('/tmp'))",
        "/tmp\n/tmp True\nFalse []\n/tmp ['x']\nFalse []\n[]\n",
    ),
    "moved about": (
        "import os, shutil\nopen('/tmp/a', 'w').write('a')\nos.rename('/tmp/a', '/mnt/data/b')\nos.makedirs('/mnt/data/x/y')\n"
        "os.replace('/mnt/data/b', '/mnt/data/x/y/c')\nshutil.move('/mnt/data/x/y/c', os.path.dirname(image_path) + '/d')\n"
        "print(open('/data/in/d').read(), os.listdir('/tmp'), os.listdir('/mnt/data/x/y'))\nshutil.rmtree('/mnt/data/x')\n"
        "print(os.listdir('/mnt/data'))",
        "a [] []\n['temp_processed_images']\n",
    ),
    "found by name": (
        "import glob, os, pathlib\nfor p in ('/mnt/data/a.txt', '/tmp/b.txt', '/data/in/c.txt', 'd.txt'): open(p, 'w').close()\n"
        "print(glob.glob('/mnt/data/*.txt'), glob.glob('/tmp/*.txt'), glob.glob('/data/in/*.txt'), glob.glob('*.txt'))\n"
        "print(sorted(p.name for p in pathlib.Path('/mnt/data').rglob('*.txt')), [f for _, _, f in os.walk('/tmp') if 'b.txt' in f])",
        "['/mnt/data/a.txt'] ['/tmp/b.txt'] ['/data/in/c.txt'] ['d.txt']\n['a.txt', 'd.txt'] [['b.txt']]\n",
    ),
    "arrays": (
        "import numpy as np\na = np.arange(6.0)\nnp.save('/tmp/a.npy', a); np.savez('z', a=a)\n"
        "print((np.load('/tmp/a.npy') == a).all(), np.load('z.npz')['a'].sum())",
        "True 15.0\n",
    ),
    "errors": (
        "import os, traceback\nfor p in ('/tmp/none', '/mnt/data/none', '/data/in/none', 'none'):\n"
        "    try: open(p)\n    except OSError as e: print(e.filename.rpartition('/')[2], e.strerror)\n",
        "none No such file or directory\n" * 4,
    ),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("how", ["mounted", "forked_on_demand", "patched"])
def test_a_snippet_finds_the_same(how: str, name: str, request: pytest.FixtureRequest, image: Image.Image) -> None:
    code, printed = SAME[name]
    result = request.getfixturevalue(how).run(code, image, "/data/in/photo.jpg")
    assert (result.status, without_python(result.stdout)) == (Status.OK, printed), result


# What only the kernel can give: functions captured before any patch, and code that is not Python's.
NORMAL = {
    "a function that was captured": (
        "from os import remove, listdir\nfrom io import open as raw\nimport _io, posix\nopen('/tmp/x', 'w').close()\n"
        "print(posix.listdir('/tmp'), listdir('/data/in'))\nremove('/tmp/x')\n_io.open('/mnt/data/y', 'w').close()\n"
        "print(sorted(posix.listdir('/mnt/data')), posix.stat(image_path).st_size > 0, posix.getcwd())",
        "['x'] ['photo.jpg']\n['temp_processed_images', 'y'] True /mnt/data/temp_processed_images\n",
    ),
    "another that was captured": (
        "a = np.arange(6.0)\nnp.savetxt('/mnt/data/a.txt', a)\nprint((np.loadtxt('/mnt/data/a.txt') == a).all())",
        "True\n",
    ),
    "code in C": (
        "import ctypes, cv2, numpy as np\nlibc = ctypes.CDLL(None)\nprint(libc.access(b'/data/in/photo.jpg', 4), libc.access(b'/tmp', 2))\n"
        "cv2.FileStorage('/tmp/s.yml', 1).release()\nprint(os.listdir('/tmp'), np.fromfile(image_path, 'u1', 2).size)\n"
        "print([p.path for p in os.scandir('/data/in')], cv2.haveImageReader(image_path))",
        "0 0\n['s.yml'] 2\n['/data/in/photo.jpg'] True\n",
    ),
    "nothing is patched": (
        "import os, builtins, io, tempfile\nprint([f.__module__ for f in (os.open, os.stat, os.remove, os.getcwd, open)], open is io.open)",
        "['posix', 'posix', 'posix', 'posix', 'io'] True\n",
    ),
    "nothing else": (
        "import os\nprint([p for p in ('/proc', '/etc', '/images', '/new', '/old', '/slots', '/var') if os.path.exists(p)])\n"
        "print([os.access(p, os.W_OK) for p in ('/', '/mnt', '/data', '/usr', '/data/in', '/tmp', '/mnt/data')])",
        "[]\n[False, False, False, False, True, True, True]\n",
    ),
}


@pytest.mark.parametrize("name", NORMAL)
@pytest.mark.parametrize("how", ["mounted", "forked_on_demand"])
def test_paths_are_what_they_seem(how: str, name: str, request: pytest.FixtureRequest, image: Image.Image) -> None:
    code, printed = NORMAL[name]
    result = request.getfixturevalue(how).run(code, image, "/data/in/photo.jpg")
    assert (result.status, without_python(result.stdout)) == (Status.OK, printed), result


# --- where the image can be ------------------------------------------------------------------------------------------

_PACKAGES = Path(np.__file__).parents[1]
_PLACES = [
    "image.png",
    "images/photo.jpg",
    "./photo.jpg",
    "../photo.jpg",
    "/photo.jpg",
    "/mnt/data/photo.jpg",
    "/mnt/data/in/photo.jpg",
    "/mnt/photo.jpg",
    "/mnt/other/photo.jpg",
    "/mnt/data/temp_processed_images/photo.jpg",
    "/tmp/photo.jpg",
    "/tmp/a/b/photo.jpg",
    "/data/a b/Ünï/photo.jpg",
    "//data//photo.jpg",
    "/home" + "/user/pictures/photo.jpg",
    "/proc/self/photo.jpg",
    "/usr/photo.jpg",
    "/usr/local/share/pictures/photo.jpg",
    "/dev/photo.jpg",
    str(_PACKAGES.parents[1] / "pictures" / "photo.jpg"),
    str(_PACKAGES / "photo.jpg"),
    "https://example.com/photo.jpg",
    "C:\\photos\\photo.jpg",
    "~/photo.jpg",
    "/" + "/".join("a" * 60) + "/photo.jpg",
]
_READS = (
    "import os, cv2\nprint(os.path.isfile(image_path), open(image_path, 'rb').read(1) != b'', Image.open(image_path).size, "
    "cv2.imread(image_path).shape[:2])\nImage.open(image_path).crop((10, 20, 40, 50)).save('a.png')"
)


@pytest.mark.parametrize("path", _PLACES)
def test_the_image_is_where_it_was_said_to_be(
    path: str, mounted: Sandbox, patched: Sandbox, image: Image.Image
) -> None:
    for sandbox in (mounted, patched):
        with sandbox.session(image, path) as session:
            for _ in range(2):
                result = session.run(_READS)
                assert result.stdout == "True True (120, 80) (80, 120)\n", result
                assert [i.size for i in result.images] == [(30, 30)]
                assert np.array_equal(np.asarray(result.images[0]), np.asarray(image)[20:50, 10:40])
    assert mounted._client.restarts == 0


@pytest.mark.parametrize(
    "path",
    [
        "/data/x/../photo.jpg",
        "/" + "/".join("a" * 200) + "/x.jpg",
        "/data/" + "x" * 300 + ".jpg",
        "/data/\0.jpg",
        "/mnt/data",
        "/usr",
        "/",
    ],
)
def test_where_no_file_can_be_the_image_is_opened_all_the_same(path: str, mounted: Sandbox, image: Image.Image) -> None:
    result = mounted.run("im = Image.open(image_path)\nprint(im.size)\nim.save('a.png')", image, path)
    assert (result.stdout, len(result.images)) == ("(120, 80)\n", 1), result


@pytest.mark.parametrize(
    ("image_path", "folder"),
    [
        ("/data/a.png", "/data"),
        ("/data/x/../a.png", "/data"),
        ("/a.png", None),
        ("a.png", None),
        ("../../../x/a.png", "/x"),
        ("/tmp/a.png", None),
        ("/tmp/x/a.png", None),
        ("/tmpfs/a.png", "/tmpfs"),
        ("/mnt/a.png", None),
        ("/mnt/data2/a.png", "/mnt/data2"),
        ("/opt/env/a.png", None),
        ("/opt/env/lib/numpy/a.png", None),
        ("/opt/env/lib/numpy/data/a.png", None),
        ("/opt/envy/a.png", "/opt/envy"),
    ],
)
def test_whose_folder_the_image_is_in(image_path: str, folder: str | None) -> None:
    assert folder_of_image(image_path, ["/opt/env/lib/numpy", "/opt/env/lib/mod.py"]) == folder
    assert place_of(image_path).startswith("/") and ".." not in place_of(image_path)


def test_what_is_moved_into_a_new_root() -> None:
    readable = (("/usr/lib/x", True), ("/usr/share/f.py", False), ("/tmp/env/y", True), ("/dev/null", False))
    base = BaseRoot(tops=("/dev", "/usr"), readable=readable, namespace=-1, proc=-1)
    image = InputImage(file="f", path="/usr/pictures/a.png", folder="/usr/pictures")
    usual, special = base.layout(), base.layout(image)
    assert usual.moves == ("/dev", "/usr", "/tmp/env/y")
    assert special.moves == ("/dev", "/usr/lib/x", "/usr/share/f.py", "/tmp/env/y")
    assert set(special.folders) - set(usual.folders) == {"/usr/lib", "/usr/lib/x", "/usr/share"}
    assert set(special.files) - set(usual.files) == {"/usr/share/f.py"}
    assert not base.has_room_for(image)


def test_packages_below_the_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: Image.Image) -> None:
    """A virtual environment in /tmp: it is read where it is, and its pictures are no results."""
    package = tmp_path / "pictured"
    package.mkdir()
    (package / "__init__.py").write_text("")
    picture(9, 9).save(package / "logo.png")
    monkeypatch.syspath_prepend(tmp_path)
    with Sandbox(SandboxConfig(**_LIMITS, preload=("pictured",))) as sandbox:
        code = (
            "import os, tempfile, pictured\nprint(os.listdir(pictured.__path__[0]))\n"
            "try: open(pictured.__path__[0] + '/x', 'w')\nexcept OSError as e: print('refused')\n"
            "with tempfile.NamedTemporaryFile() as f: pass\nImage.open(image_path).save('/tmp/a.png')\nprint(os.path.exists('/tmp/a.png'))"
        )
        result = sandbox.run(code, image, "/tmp/photo.jpg")
        assert "'logo.png'" in result.stdout.splitlines()[0], result
        assert result.stdout.splitlines()[1:] == ["refused", "True"], result
        assert [i.size for i in result.images] == [(120, 80)]
        check_crop(sandbox, image)


# --- results, quotas, sessions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mounted", "patched"])
@pytest.mark.parametrize("folder", ["/mnt/data", "/tmp", "/data/in", "/mnt/data/new/one", "/tmp/new", "/data/in/new"])
def test_images_come_back_from_everywhere(
    how: str, folder: str, request: pytest.FixtureRequest, image: Image.Image
) -> None:
    """However they are written, named or not; the input is none of them."""
    with request.getfixturevalue(how).session(image, "/data/in/photo.jpg") as session:
        first = session.run(f"Image.open(image_path).crop((0, 0, 7, 5)).save('{folder}/a.png')")
        assert [i.size for i in first.images] == [(7, 5)], first
        plain = f"import os, io\nos.makedirs('{folder}', exist_ok=True)\nb = io.BytesIO(); Image.new('RGB', (6, 4)).save(b, 'PNG')\n"
        second = session.run(plain + f"open('{folder}/b.png', 'wb').write(b.getvalue())")
        assert [i.size for i in second.images] == [(6, 4)], second
        third = session.run(f"print('{folder}/a.png')")
        assert [i.size for i in third.images] == [(7, 5)], third
        assert session.run("print(image_path)").images == session.run("print(os.listdir('/tmp'))").images == ()


@pytest.mark.parametrize("path", [None, "/data/in/photo.jpg", "/tmp/a/b/photo.jpg"])
def test_as_many_files_as_were_promised_and_no_more(path: str | None, image: Image.Image) -> None:
    """Whatever the sandbox itself puts into the scratch."""
    for off in (frozenset[str](), frozenset({"parking"})):
        with Sandbox(SandboxConfig(**_LIMITS, max_files=7, max_images=2, scratch_mib=2), _off=off) as sandbox:
            if not is_mounted(sandbox):
                pytest.skip("scratch is on a disk here: looked at every 20 ms")
            for number, status in ((7, Status.OK), (8, Status.OUTPUT_LIMIT)):
                code = f"for i in range({number}): open(('/tmp/', '/mnt/data/')[i % 2] + str(i), 'w').close()"
                assert sandbox.run(code, path and image, path).status is status
            for mib, status in ((1, Status.OK), (2, Status.OUTPUT_LIMIT)):
                code = f"open('/tmp/large', 'wb').write(bytes(1 << 20)); open('/mnt/data/b', 'wb').write(bytes({mib} << 20))"
                assert sandbox.run(code, path and image, path).status is status


@pytest.mark.parametrize("how", ["mounted", "forked_on_demand", "patched"])
def test_sessions_share_an_image_and_nothing_else(how: str, request: pytest.FixtureRequest, image: Image.Image) -> None:
    sandbox, attack = request.getfixturevalue(how), "import os\n"
    for step in (
        "Image.new('RGB', (4, 4)).save(image_path)",
        "open(image_path, 'wb').write(b'x')",
        "os.remove(image_path)",
        "os.rename(image_path, '/tmp/x')",
        "os.truncate(image_path, 0)",
        "os.rename('/data/in', '/data/out')",
        "os.open(image_path, os.O_RDWR)",
    ):
        attack += f"try:\n    {step}\n    print('ESCAPED')\nexcept OSError: pass\n"
    with sandbox.session(image, "/data/in/photo.jpg") as one, sandbox.session(image, "/data/in/photo.jpg") as other:
        look = "print(sorted(os.listdir('/data/in')), os.listdir('/tmp'), os.listdir('/mnt/data'), Image.open(image_path).size)"
        before = other.run(look).stdout
        assert (
            one.run(attack + "for f in ('/tmp/', '/mnt/data/', '/data/in/'): open(f + 'mine', 'w').close()").stdout
            == ""
        )
        assert other.run(look).stdout == before
        assert "mine" not in before and "(120, 80)" in before
    with sandbox.session(image, "/data/in/photo.jpg") as later:
        assert later.run(look).stdout == before


@pytest.mark.parametrize("how", ["mounted", "patched"])
def test_an_image_per_session(how: str, request: pytest.FixtureRequest) -> None:
    sandbox = request.getfixturevalue(how)
    sizes = [(20, 10), (30, 10), (40, 10)]
    sessions = [sandbox.session(picture(*size), "/data/in/photo.jpg") for size in sizes]
    for _ in range(2):
        assert [s.run("print(Image.open(image_path).size)").stdout for s in sessions] == [f"{size}\n" for size in sizes]
    for session in sessions:
        session.close()


@pytest.mark.parametrize("off", [frozenset(), frozenset({"namespaces"})], ids=["mounted", "patched"])
def test_after_a_time_out_and_in_the_released_dialect(off: frozenset[str], image: Image.Image) -> None:
    config = SandboxConfig(workers=2, memory_mib=256, timeout_s=1.0, compat="released")
    with Sandbox(config, _off=off) as sandbox, sandbox.session(image, "/data/in/photo.jpg") as session:
        code = "im = Image.open(image_path)\nbox = (10, 20, 20, 30)\nim.crop(box).save('/data/in/a.png'); open('/tmp/x', 'w').close()"
        assert [i.size for i in session.run(code).images] == [(64, 64)]
        kept = session.run("image_path = '/data/in/photo.jpg'\nprint(image_path, os.listdir('/tmp'))")
        assert without_python(kept.stdout) == "/data/in/photo.jpg ['x']\n", kept
        assert session.run("while True: pass").status is Status.TIMEOUT
        after = session.run("print(os.listdir('/tmp'), os.path.isfile(image_path), Image.open(image_path).size)")
        assert (without_python(after.stdout), after.restarted) == ("[] True (120, 80)\n", True)
        assert [i.size for i in session.run(code).images] == [(64, 64)]


def test_what_a_parked_child_is_given_comes_from_its_own_order(mounted: Sandbox) -> None:
    """The root of a child that was forked ahead is entered from outside, for each order anew."""
    for size in ((20, 10), (30, 10), (40, 10)):
        for path in ("/one/photo.jpg", "/two/photo.jpg"):
            code = "print(Image.open(image_path).size, [os.path.exists(p) for p in ('/one', '/two')])"
            seen = mounted.run(code, picture(*size), path).stdout
            assert seen == f"{size} [{path.startswith('/one')}, {path.startswith('/two')}]\n"
    assert mounted._client.restarts == 0


def test_the_fork_server_keeps_no_mount_and_no_descriptor(mounted: Sandbox, image: Image.Image) -> None:
    from tests.sandbox.host import server_of

    server = server_of(mounted)

    def held() -> tuple[int, int]:
        mounts = len(Path(f"/proc/{server}/mountinfo").read_text().splitlines())
        return mounts, len(os.listdir(f"/proc/{server}/fd"))  # noqa: PTH208

    check_crop(mounted, image)
    assert eventually(lambda: len(mounted._client.rounds.live) == 0)
    before = held()
    for path in ("/data/in/photo.jpg", "/tmp/x/photo.jpg", "/data/\0"):
        for _ in range(3):
            mounted.run("print(1)", image, path)
    assert eventually(lambda: held() <= before), (held(), before)


def test_the_doctor_says_how_paths_are_arranged(mounted: Sandbox) -> None:
    layer = next(layer for layer in mounted.layers() if layer.name == "private root")
    assert "/mnt/data, /tmp and the folder of the image" in layer.detail


def test_without_the_right_to_mount_paths_are_patched(host: Host, image: Image.Image) -> None:
    """A machine where the fork-server gets a mount namespace but no child could: found out at the start."""
    with Sandbox(SandboxConfig(**_LIMITS), _off=frozenset({"mount"})) as sandbox:
        assert not is_mounted(sandbox) and sandbox.isolation == "strong"
        code, printed = SAME["the input image"]
        assert sandbox.run(code, image, "/data/in/photo.jpg").stdout == printed
        assert sandbox.run(host.fill("print(os.path.exists('/mnt/data/x'))\nopen('{secret}')")).status is Status.ERROR
