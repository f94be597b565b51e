"""The libraries of the extra `sandbox`, preloaded: they work inside of the jail, and figures come back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from PIL import Image

from thyme.sandbox import Sandbox, SandboxConfig, Status

PLT = "import matplotlib.pyplot as plt\n"


@pytest.fixture(scope="module")
def plotting() -> Iterator[Sandbox]:
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra 'sandbox'")
    with Sandbox(SandboxConfig(workers=1, timeout_s=60.0, preload=("matplotlib",))) as sandbox:
        yield sandbox


@pytest.mark.parametrize(
    ("code", "sizes"),
    [
        ("plt.plot([1, 2, 3])\nplt.title('a $x^2$')\nplt.show()", [(640, 480)]),
        (
            "plt.figure(figsize=(2, 1))\nplt.pie([1, 2])\nplt.figure()\nplt.bar([1], [2])\nplt.show()",
            [(200, 100), (640, 480)],
        ),
        ("fig, ax = plt.subplots(figsize=(3, 2))\nax.imshow([[1, 2], [3, 4]])\nfig.savefig('a.png')", [(300, 200)]),
        ("plt.hist([1, 2, 2])\nplt.savefig('/mnt/data/b.jpg')\nprint('/mnt/data/b.jpg')", [(640, 480)]),
        ("plt.figure().add_subplot(projection='3d').plot([1], [1], [1])\nplt.show()", [(640, 480)]),
        ("plt.imshow(plt.imread(image_path))\nplt.axis('off')\nplt.show()", [(640, 480)]),
    ],
)
def test_figures_come_back(plotting: Sandbox, image: Image.Image, code: str, sizes: list[tuple[int, int]]) -> None:
    result = plotting.run(PLT + code, image)
    assert result.status is Status.OK, result
    assert [image.size for image in result.images] == sizes
    assert all(len(set(image.convert("L").tobytes())) > 1 for image in result.images)


def test_a_figure_is_shown_once(plotting: Sandbox) -> None:
    with plotting.session() as session:
        assert len(session.run(PLT + "plt.plot([1])\nplt.show()").images) == 1
        assert session.run("plt.show()").images == ()


@pytest.mark.soak
@pytest.mark.parametrize(
    ("package", "code", "stdout"),
    [
        (
            "scipy",
            "from scipy import ndimage, stats\nprint(ndimage.label([[1, 0], [0, 1]])[1], stats.norm.cdf(0))",
            "2 0.5",
        ),
        ("scipy", "from scipy import optimize\nprint(round(optimize.brentq(lambda x: x * x - 2, 0, 2), 4))", "1.4142"),
        ("skimage", "from skimage import measure\nimport numpy as np\nprint(measure.label(np.eye(3)).max())", "1"),
        (
            "skimage",
            "from skimage.filters import threshold_otsu\nimport numpy as np\nprint(threshold_otsu(np.arange(4)))",
            "1",
        ),
        ("pandas", "import pandas as pd\nprint(pd.DataFrame({'a': [1, 2]})['a'].mean())", "1.5"),
        ("sympy", "import sympy as sp\nx = sp.Symbol('x')\nprint(sp.solve(x**2 - 4))", "[-2, 2]"),
    ],
)
def test_a_preloaded_library_works(package: str, code: str, stdout: str) -> None:
    pytest.importorskip(package, reason=f"{package} is in the extra 'sandbox'")
    with Sandbox(SandboxConfig(workers=1, timeout_s=60.0, preload=(package,))) as sandbox:
        result = sandbox.run(code)
    assert (result.status, result.stdout.strip()) == (Status.OK, stdout), result
