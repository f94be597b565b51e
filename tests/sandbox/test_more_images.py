"""Several input images: each at the path that the model was told, in every mode of the sandbox."""

from collections.abc import Iterator

import pytest
from PIL import Image

from thyme.sandbox import Sandbox, SandboxConfig, Status

FIRST, SECOND, THIRD = (Image.new("RGB", size, "red") for size in ((60, 40), (30, 20), (10, 15)))
PATHS = ("/mnt/data/a.png", "/mnt/data/b.png", "pictures/c.png")
SIZES = "from PIL import Image\n" + "".join(f"print(Image.open({path!r}).size)\n" for path in PATHS)


@pytest.fixture(scope="module", params=["own root", "translated"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    off = frozenset() if request.param == "own root" else frozenset({"namespaces"})
    with Sandbox(SandboxConfig(workers=1, memory_mib=256), _off=off) as sandbox:
        yield sandbox


def test_each_image_is_at_its_path_and_none_is_taken_for_another(sandbox: Sandbox) -> None:
    more = tuple(zip(PATHS[1:], (SECOND, THIRD), strict=True))
    for _ in range(2):  # a parked child may be there the second time
        with sandbox.session(FIRST, PATHS[0], more_images=more) as session:
            result = session.run(SIZES)
            assert result.stdout == "(60, 40)\n(30, 20)\n(10, 15)\n" and not result.fixes, result
            result = session.run("Image.open('/mnt/data/d.png')")
            assert result.status is Status.ERROR and result.error is not None
            assert result.error.type == "FileNotFoundError"
            result = session.run(f"print({PATHS[1]!r})\nimage_path")
            assert not result.images and result.stdout == f"{PATHS[1]}\n"
            result = session.run("Image.open('/mnt/data/b.png').save('/mnt/data/b2.png')\nprint('/mnt/data/b2.png')")
            assert [image.size for image in result.images] == [(30, 20)]
            denied = session.run("open('/mnt/data/b.png', 'w').write('x')")
            assert denied.status is not Status.OK
        with sandbox.session(FIRST, PATHS[0], more_images=more) as session:
            result = session.run("from PIL import Image\nImage.open('/mnt/data/d.png')")
            assert result.status is Status.ERROR and not result.fixes  # nor before any of them was opened
    with sandbox.session(FIRST, PATHS[0]) as session:  # with one image a misnamed path is still taken for it
        assert session.run("from PIL import Image\nprint(Image.open('/mnt/data/d.png').size)").stdout == "(60, 40)\n"


def test_what_cannot_be_given_is_refused(sandbox: Sandbox) -> None:
    for image, path, more, words in (
        (None, None, (("b.png", SECOND),), "behind a first image"),
        (FIRST, "a.png", tuple((f"{i}.png", SECOND) for i in range(32)), "at most 31"),
        (FIRST, "a.png", (("/mnt/data/temp_processed_images/a.png", SECOND),), "two images at one path"),
        (FIRST, "a.png", (("b.png", "/nowhere.png"),), "cannot be read"),
    ):
        with pytest.raises(ValueError, match=words):
            sandbox.session(image, path, more_images=more)
