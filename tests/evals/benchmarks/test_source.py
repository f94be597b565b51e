"""Benchmarks from their files: every layout read, and what cannot be read named."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.evals.benchmarks.published import ROWS, choice, picture, write_json, write_tsv
from tests.material import DATA
from thyme.data.refusal import BadRow
from thyme.evals.benchmarks.known import BENCHMARKS, benchmark
from thyme.evals.benchmarks.source import BenchmarkFile, files_of


@pytest.mark.parametrize("name", ROWS)
def test_each_published_layout_is_read(name: str, tmp_path: Path) -> None:
    rows = BenchmarkFile(benchmark(name), write_tsv(tmp_path / f"{name}.tsv", ROWS[name]))
    assert len(rows) == len(ROWS[name]) and not rows.left_out
    for number, row in enumerate(ROWS[name]):
        asked = rows.question(number)
        assert asked.id == f"{name}/{row['index']}" and asked.solution == str(row["answer"])
        assert asked.image is not None and asked.image.size == (56, 56)
        assert str(row["question"]) in asked.question


def test_options_come_from_columns_or_from_a_list(tmp_path: Path) -> None:
    lite = BenchmarkFile(benchmark("MME-RealWorld-Lite"), write_tsv(tmp_path / "a.tsv", ROWS["MME-RealWorld-Lite"]))
    assert lite.items[0].options == {letter: f"text {letter}" for letter in "ABCDE"}
    assert "A. text A\nB. text B" in lite.question(0).question
    star = BenchmarkFile(benchmark("v*"), write_tsv(tmp_path / "b.tsv", ROWS["VStarBench"]))
    assert [list(item.options) for item in star.items] == [["A", "B", "C", "D"], ["A", "B"]]


def test_a_row_may_share_the_picture_of_another(tmp_path: Path) -> None:
    rows = [choice(7, image=picture("blue")), choice(8, image="7"), choice(9, image="10"), choice(10, image="9")]
    file = BenchmarkFile(benchmark("mcq"), write_tsv(tmp_path / "a.tsv", rows))
    assert file.question(1).image.getpixel((0, 0)) == (0, 0, 255)  # type: ignore[union-attr]
    with pytest.raises(BadRow, match="index 9: its picture is that of row 9, which has none"):
        file.question(2)


def test_a_row_that_is_left_out_still_lends_its_picture(tmp_path: Path) -> None:
    rows = [choice(7, image=picture("blue"), question=""), choice(8, image="7")]
    file = BenchmarkFile(benchmark("mcq"), write_tsv(tmp_path / "a.tsv", rows))
    assert [item.index for item in file.items] == ["8"] and file.known == {"7", "8"}
    assert file.question(0).image.getpixel((0, 0)) == (0, 0, 255)  # type: ignore[union-attr]


def test_several_pictures_keep_their_order_and_their_names(tmp_path: Path) -> None:
    colors = [picture("red"), picture("blue")]
    rows = [choice(0, image=str(colors), image_path=""), choice(1, image=colors[0], image_path="folder/sign.jpg")]
    file = BenchmarkFile(benchmark("BLINK"), write_tsv(tmp_path / "BLINK.tsv", rows))
    both, one = file.question(0), file.question(1)
    assert [(path, image.getpixel((0, 0))) for path, image in both.pictures] == [
        ("0_1.png", (255, 0, 0)),
        ("0_2.png", (0, 0, 255)),
    ]
    assert one.image_path == "sign.jpg"


def test_parquet_and_json_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [choice(i, "B") for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "BLINK.parquet")
    files = [tmp_path / "BLINK.parquet", write_json(tmp_path / "BLINK.json", rows), write_tsv(tmp_path / "x.tsv", rows)]
    read = [BenchmarkFile(benchmark("BLINK"), path) for path in files]
    assert [[item.index for item in file.items] for file in read] == [["0", "1", "2"]] * 3
    assert len({file.question(1).question for file in read}) == 1


def test_a_folder_is_searched_for_the_file_of_the_name(tmp_path: Path) -> None:
    for name in ("MME-RealWorld", "MME-RealWorld-Lite", "HRBench4K"):
        write_tsv(tmp_path / f"{name}.tsv", ROWS["HRBench4K"])
    (tmp_path / "hr_bench_8k").mkdir()
    write_tsv(tmp_path / "hr_bench_8k" / "part-00000-of-00001.tsv", ROWS["HRBench4K"])
    found = {name: [p.name for p in files_of(benchmark(name), tmp_path)] for name in ("MME-RealWorld", "HRBench8K")}
    assert found == {"MME-RealWorld": ["MME-RealWorld.tsv"], "HRBench8K": ["part-00000-of-00001.tsv"]}
    with pytest.raises(ValueError, match=r"no file of VStarBench: name it like VStarBench\.tsv"):
        files_of(benchmark("VStarBench"), tmp_path)


def test_a_copy_without_pictures_gives_way_to_the_whole_file(tmp_path: Path) -> None:
    whole = write_tsv(tmp_path / "MMVP.tsv", [choice(0), choice(1)])
    copy = write_tsv(tmp_path / "MMVP_local.tsv", [choice(0, image="0.png"), choice(1, image="1.png")])
    assert files_of(benchmark("MMVP"), tmp_path) == [whole]
    whole.unlink()
    assert files_of(benchmark("MMVP"), tmp_path) == [copy]


def test_rows_that_say_something_else_are_others_though_no_byte_longer(tmp_path: Path) -> None:
    """Answers of a run are gone on with for the same rows only."""
    said = [
        BenchmarkFile(benchmark("mcq"), write_tsv(tmp_path / "a.tsv", [choice(0, answer), choice(1)])).identity
        for answer in ("A", "A", "B")
    ]
    assert said[0] == said[1] != said[2] and said[0]["bytes"] == said[2]["bytes"]


def test_parts_count_their_rows_each_for_itself(tmp_path: Path) -> None:
    for part in ("BLINK_depth", "BLINK_jigsaw"):
        write_tsv(tmp_path / f"{part}.tsv", [choice(0), choice(1)])
    file = BenchmarkFile(benchmark("BLINK"), tmp_path)
    assert [item.index for item in file.items] == [f"BLINK_{p}/{i}" for p in ("depth", "jigsaw") for i in (0, 1)]


def test_what_cannot_be_used_is_counted_once_and_the_first_of_each_kind_is_named(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", [choice(0), choice(1, question=""), choice(2, image="bm9waWN0dXJl")])
    path.write_text(path.read_text() + "4\tcut short\n")
    file = BenchmarkFile(benchmark("mcq"), path)
    assert dict(file.left_out) == {"incomplete": 1, "wrong number of fields": 1}
    assert "a.tsv, row 2: column 'question' is empty" in file.summary()
    assert "a.tsv, row 4: " in file.summary()
    with pytest.raises(BadRow, match=r"a\.tsv, index 2: image 0: ") as refused:
        file.question(1)
    for _ in range(2):  # with tools, and again under a control
        file.refuse(refused.value)
    assert file.left_out["picture"] == 1 and "1 picture (a.tsv, index 2: image 0: " in file.summary()


def test_a_row_whose_picture_is_missing_is_not_asked_without_it(tmp_path: Path) -> None:
    rows = [choice(0), choice(1, image=""), choice(2, image="1")]
    pq.write_table(pa.Table.from_pylist([*rows[:1], choice(1, image=None)]), tmp_path / "a.parquet")
    written = [write_tsv(tmp_path / "a.tsv", rows), write_json(tmp_path / "a.json", rows), tmp_path / "a.parquet"]
    for path in written:
        file = BenchmarkFile(benchmark("mcq"), path)
        for number in range(1, len(file)):
            with pytest.raises(BadRow, match=f"index {number}: column 'image' is empty: its picture is missing"):
                file.question(number)
    bare = [{name: value for name, value in row.items() if name != "image"} for row in rows]
    assert BenchmarkFile(benchmark("mcq"), write_tsv(tmp_path / "b.tsv", bare)).question(0).image is None


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([choice(0), choice(0)], "row 2: index 0 stands twice"),
        ([{"index": 0, "question": "?"}], "no usable row.*column 'answer' is missing"),
        ([{"question": "?", "answer": "A"}], "no usable row.*column 'index' is missing"),
        ([choice(0, " ")], "no usable row.*column 'answer' is empty"),
        ([choice(0, "['', ' ']")], "no usable row.*column 'answer' is empty"),
    ],
)
def test_a_file_that_cannot_be_scored_is_refused(rows: list[dict[str, object]], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        BenchmarkFile(benchmark("mcq"), write_tsv(tmp_path / "a.tsv", rows))


def test_an_answer_by_name_is_none(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [choice(0), choice(1, {"text": "A", "box": [1, 2]})])
    file = BenchmarkFile(benchmark("mcq"), path)
    assert len(file) == 1 and "row 2: column 'answer' is an object" in file.summary()


def test_an_unknown_benchmark_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'HRBench8K'"):
        benchmark("HRBench16K")
    assert {benchmark(name.upper()).name for known in BENCHMARKS for name in (known.name, *known.also)} == {
        known.name for known in BENCHMARKS
    }


REAL = sorted((DATA / "benchmarks").glob("*.tsv"))


@pytest.mark.skipif(not REAL, reason="no benchmark rows: set THYME_DATA to the folder that holds benchmarks/")
def test_real_rows_are_read_with_all_their_pictures() -> None:
    counts = {}
    for path in REAL:
        file = BenchmarkFile(benchmark("BLINK" if "BLINK" in path.name else "MMVP"), path)
        assert not file.left_out
        questions = [file.question(number) for number in range(0, len(file), 10)]
        counts[path.stem] = (len(file), {len(asked.pictures) for asked in questions})
    assert counts == {
        "BLINK_depth": (124, {1}),
        "BLINK_jigsaw": (150, {3}),
        "BLINK_spatial": (143, {1}),
        "MMVP": (300, {1}),
    }
