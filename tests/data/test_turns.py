"""What a user's turn says, and paths that name no machine."""

import pytest

from thyme.data.turns import portable, portable_paths, rewritten, taken_apart
from thyme.rollout.prompts import text_prompt, user_prompt


@pytest.mark.parametrize(
    "turn",
    [
        user_prompt("What?\n\nA. 1\nB. 2", "/disk/a b.png", (4, 5)),
        user_prompt("What?\n\nA. 1\nB. 2", "/disk/a b.png", None),
        user_prompt("What?\n\nA. 1\nB. 2", "/disk/a b.png", (4, 5)).replace("Path:**", "Path:").rstrip(),
    ],
)
def test_the_template_is_taken_apart(turn: str) -> None:
    assert taken_apart(turn) == ("What?\n\nA. 1\nB. 2", ["/disk/a b.png"], True)


def test_a_turn_of_several_pictures_or_none() -> None:
    several = user_prompt("Which?", "/d/a.png", (4, 5), [("/d/b.png", (6, 7))])
    assert several.startswith('<image>\n<image>\nWhich?\n\n### User Image Path:** "/d/a.png"\n### User Image Size:')
    assert taken_apart(several) == ("Which?", ["/d/a.png", "/d/b.png"], True)
    assert taken_apart(text_prompt("Why?")) == ("Why?", [], True)
    assert taken_apart('<image>\nWhy "### so"?') == ('Why "### so"?', [], False)


@pytest.mark.parametrize(
    ("path", "becomes"),
    [
        ("/mllm_hdd/someone/data/a_1.png_rotated_30.png", "/mnt/data/a_1.png_rotated_30.png"),
        ("hr_bench_4k/179.jpg", "hr_bench_4k/179.jpg"),
        ("/mnt/data/x/a.png", "/mnt/data/x/a.png"),
        ("../up/a.png", "/mnt/data/a.png"),
        ("~/a.png", "/mnt/data/a.png"),
        ("C:\\pictures\\a.png", "/mnt/data/a.png"),
        ('/d/a"b\n.png', "/mnt/data/a_b_.png"),
        ("/mnt/data/../../etc/a.png", "/mnt/data/a.png"),
        ("/d/" + "x" * 300 + ".png", "/mnt/data/" + "x" * 116 + ".png"),
        ("", "image.png"),
        ("/", "/mnt/data/image.png"),
    ],
)
def test_a_path_that_names_a_machine_becomes_one_of_the_sandbox(path: str, becomes: str) -> None:
    assert portable(path) == becomes


def test_no_two_pictures_have_one_path() -> None:
    assert portable_paths(["/a/x.png", "/b/x.png"], 3) == ["/mnt/data/x.png", "/mnt/data/x_2.png", "image.png"]
    assert portable_paths([], 2) == ["image.png", "image_2.png"]


def test_a_response_opens_its_picture_where_the_sandbox_has_it() -> None:
    told = "/hdd/me/data/in/cat.png"
    response = "\n".join(
        (
            "The picture /hdd/me/data/in/cat.png is dark.",
            'image_path = "/hdd/me/data/in/cat.png"',
            "image = Image.open('/other/root/cat.png')",
            'out = "/hdd/me/data/in/cat.png_crop_1.png"',
            'out = os.path.join("/hdd/me/data/in", "b.png")',
            'out = "/mnt/data/temp_processed_images/cat.png"',
            'x = "/hdd/me/data/inner/z.png"',
        )
    )
    assert rewritten(response, [told], [portable(told)]).splitlines() == [
        "The picture /mnt/data/cat.png is dark.",
        'image_path = "/mnt/data/cat.png"',
        "image = Image.open('/mnt/data/cat.png')",
        'out = "/mnt/data/temp_processed_images/cat.png_crop_1.png"',
        'out = os.path.join("/mnt/data/temp_processed_images", "b.png")',
        'out = "/mnt/data/temp_processed_images/cat.png"',
        'x = "/hdd/me/data/inner/z.png"',
    ]
    assert rewritten(response, ["/mnt/data/cat.png"], ["/mnt/data/cat.png"]) == response
