"""How often the default RepetitionConfig stops honest text, and how soon it stops loops: both rates, printed.

    python bench/repetition_rates.py

Texts are cut into tokens as Qwen's are: its pre-tokenizer (a digit a token, marks in runs, words with the space before
them) over byte-level merges, which are learned here from the texts. tests/test_repetition.py holds the rates in place.
"""

import base64
import itertools
import json
import os
import pprint
import pydoc_data.topics
import random
import string
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from thyme.repetition import RepetitionConfig, RepetitionDetector, RepetitionHit, token_classes

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("THYME_DATA", ROOT.parent / "shared" / "data"))
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCABULARY = 12_000


class Text(NamedTuple):
    kind: str
    text: str


class Loop(NamedTuple):
    """A text that ends in a loop."""

    kind: str
    opening: str
    once: str
    """The first time round: not yet a repetition."""
    again: str
    """What follows until the tokens run out."""


# ---- tokens ------------------------------------------------------------------------------------------------


class QwenLike:
    """A byte-level BPE with Qwen's pre-tokenizer."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._tokenizer = Tokenizer(models.BPE())
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self._tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
        self._tokenizer.train_from_iterator(texts, trainer)
        self.classes = token_classes(map(self._bytes, range(self._tokenizer.get_vocab_size())))

    def _bytes(self, token: int) -> bytes:
        return bytes(_BYTE_OF[char] for char in self._tokenizer.id_to_token(token))

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch(list(texts))]

    def pieces(self, text: str) -> list[str]:
        return [self._bytes(token).decode(errors="replace") for token in self(text)]


def _byte_of() -> dict[str, int]:
    # The table of byte-level BPE: printable bytes stand for themselves, the others for the letters from U+0100 on.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of()


@cache
def qwen_like() -> QwenLike:
    return QwenLike([*(text for _, text in ordinary()), *(loop.opening + loop.once for loop in loops())])


# ---- honest texts ------------------------------------------------------------------------------------------


def ordinary(every: int = 1) -> Iterator[Text]:
    """Texts in which nothing is degenerate, however often they repeat what they describe; the same on any machine.

    `every`: one written text in so many, and of the drawn ones too, with texts of every kind.
    """
    yield from itertools.islice(_written(), 0, None, every)
    for seed in range(0, 4, every):
        rng = random.Random(seed)
        yield from _tables(rng)
        yield from _forms(rng)
        yield from _records(rng)
        yield from _code(rng)
        yield from _dumps(rng)
        yield from _progress(rng)
        yield from _listed(rng)
    for n in (28, 3, 16, 10, 24, 5, 13, 8, 20)[::every]:
        yield from _matrices(n)
    yield from _verses()


def installed() -> Iterator[Text]:
    """The licences of what is installed here."""
    seen = set()
    for distribution in sorted(distributions(), key=lambda found: found.metadata["Name"] or ""):
        for file in distribution.files or ():
            if "LICENSE" in file.name.upper() or file.name.upper().startswith("COPYING"):
                path = Path(str(distribution.locate_file(file)))
                text = path.read_text(errors="replace")[:20_000] if path.is_file() else ""
                if text and text not in seen:
                    seen.add(text)
                    yield Text("prose: licences", text)


def published_traces() -> Iterator[Text]:
    """What the original model wrote, where the data is there."""
    for path in sorted(DATA.glob("published_traces/*/case.json")):
        yield Text("published trace", path.read_text())
        for part in _strings(json.loads(path.read_text())):
            yield Text("published trace", part)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _written() -> Iterator[Text]:
    for topic in sorted(pydoc_data.topics.topics):
        yield Text("prose: Python's manual", pydoc_data.topics.topics[topic][:16_000])
    for name in ("README.md", "LOG.md"):
        text = (ROOT / name).read_text()
        for start in range(0, len(text), 12_000):
            yield Text("prose: Markdown", text[start : start + 12_000])
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-p]*.py")):
        yield Text("code: Python", path.read_text(encoding="utf-8", errors="replace")[:12_000])


def _matrices(n: int) -> Iterator[Text]:
    identity = [[int(i == j) for j in range(n)] for i in range(n)]
    for name, cell in (("zeros", 0), ("ones", 1), ("zeros", 0.0), ("flags", False), ("nothing", None), ("words", "")):
        rows = [[cell] * n] * n
        kind = f"matrix of {name}"
        yield Text(kind, f"grid = {rows!r}\n")
        yield Text(kind, "grid = [\n" + "".join(f"    {row!r},\n" for row in rows) + "]\n")
        yield Text(kind, "grid = " + pprint.pformat(rows))
        yield Text(kind, "\n".join(" ".join(map(str, row)) for row in rows))
        yield Text(kind, "\n".join(",".join(map(str, row)) for row in rows))
    zeros = [[0] * n] * n
    for rows in (zeros, identity, [[(i + j) % 2 for j in range(n)] for i in range(n)]):
        yield Text("matrix: numpy", repr(np.array(rows)))
        yield Text("matrix: numpy", str(np.array(rows, float)))
        body = " \\\\\n".join(" & ".join(map(str, row)) for row in rows)
        for name in ("bmatrix", "pmatrix"):
            yield Text("matrix: LaTeX", f"$$\n\\begin{{{name}}}\n{body}\n\\end{{{name}}}\n$$\n")
        yield Text("matrix: MATLAB", "A = [" + "; ".join(" ".join(map(str, row)) for row in rows) + "];\n")


def _tables(rng: random.Random) -> Iterator[Text]:
    columns, rows = rng.randint(2, 12), rng.randint(5, 60)
    heads = rng.sample(_NAMES, columns)
    for kind, cell in (
        ("zeros", "0"),
        ("zeros with decimals", "0.00"),
        ("nothing", ""),
        ("dashes", "-"),
        ("n/a", "N/A"),
        ("yes", "yes"),
        ("words", "Present"),
        ("ticks", "\u2713"),
        ("mixed", None),
    ):
        cells = [[cell if cell is not None else str(rng.choice([0, 0, 0, 1])) for _ in heads] for _ in range(rows)]
        yield Text(
            f"table of {kind}: Markdown",
            f"| {' | '.join(heads)} |\n|{'---|' * columns}\n" + "".join(f"| {' | '.join(row)} |\n" for row in cells),
        )
        body = "".join(f"{' & '.join(row)} \\\\\n" for row in cells)
        head = f"\\hline\n{' & '.join(heads)} \\\\\n\\hline\n"
        yield Text(f"table of {kind}: LaTeX", f"\\begin{{tabular}}{{{'c' * columns}}}\n{head}{body}\\end{{tabular}}")
        ruled = "".join(f"{' & '.join(row)} \\\\ \\hline\n" for row in cells)
        yield Text(f"table of {kind}: LaTeX", f"\\begin{{tabular}}{{|{'c|' * columns}}}\n{ruled}\\end{{tabular}}")
        for indent, end in (("", ""), ("    ", "\n")):
            line = "".join(
                f"<tr>{end}" + "".join(f"{indent}<td>{entry}</td>{end}" for entry in row) + "</tr>\n" for row in cells
            )
            yield Text(f"table of {kind}: HTML", f"<table>\n{line}</table>")
        yield Text(f"table of {kind}: CSV", ",".join(heads) + "\n" + "\n".join(",".join(row) for row in cells))
        yield Text(f"table of {kind}: TSV", "\t".join(heads) + "\n" + "\n".join("\t".join(row) for row in cells))
    styled = "".join('    <td class="text-center"></td>\n' for _ in range(rows))
    yield Text("table: HTML with classes", f"<tr>\n{styled}</tr>")
    numbers = [[rng.randint(-99, 999) for _ in heads] for _ in range(rows)]
    yield Text("table of numbers", "\n".join(f"| {' | '.join(map(str, row))} |" for row in numbers))
    size = rng.randint(9, 14)
    yield Text("multiplication table", "\n".join(f"{size} x {i} = {size * i}" for i in range(1, 13)))
    yield Text(
        "multiplication table",
        "".join(f"{a} \u00d7 {b} = {a * b}\n" for a in range(1, size) for b in range(1, 13)),
    )
    yield Text(
        "multiplication table",
        "\n".join(f"| {a} | " + " | ".join(str(a * b) for b in range(1, size)) + " |" for a in range(1, size)),
    )


def _forms(rng: random.Random) -> Iterator[Text]:
    fields = rng.sample(_FIELDS, rng.randint(2, 5))
    for line in ("", " ", " ____________________", " ........................", " [ ]", " N/A"):
        form = "".join(f"{field}:{line}\n" for field in fields)
        yield Text("empty form", "\n".join([form] * rng.randint(3, 24)))
    columns, rows = rng.randint(3, 8), rng.randint(10, 40)
    yield Text("empty form", "".join("|" + "   |" * columns + "\n" for _ in range(rows)))
    yield Text("empty form", "".join(f"{i}. ______________________\n" for i in range(1, rows)))
    yield Text("empty form", "[ ] Yes   [ ] No\n" * rows)
    yield Text("empty form", "".join(f"{i}. (A) (B) (C) (D)\n" for i in range(1, rows)))
    yield Text("empty form", "\u2610 Yes \u2610 No \u2610 Not applicable\n" * rows)
    days = rng.randint(5, 31)
    for mark in ("P", "Present", "\u2713", "yes", "1"):
        row = f"| {' | '.join([mark] * days)} |\n"
        yield Text("attendance sheet", row * rows)
        yield Text("attendance sheet", "".join(f"| {rng.choice(_NAMES)} {row}" for _ in range(rows)))
        absent = [mark if rng.random() < 0.95 else "A" for _ in range(days * rows)]
        yield Text(
            "attendance sheet",
            "".join(f"{i + 1},{','.join(absent[i * days : (i + 1) * days])}\n" for i in range(rows)),
        )
        yield Text("attendance sheet", "".join(f"{rng.choice(_NAMES)}: {mark}\n" for _ in range(rows)))


def _records(rng: random.Random) -> Iterator[Text]:
    n = rng.randint(8, 60)
    name, field = rng.choice(_NAMES), rng.choice(_FIELDS)
    for record in (
        {"label": name.lower(), "score": 0},
        {"bbox_2d": [0, 0, 0, 0], "label": "text"},
        {"name": "", "age": None, "city": ""},
        {"type": "paragraph", "content": [], "attributes": {"bold": False, "italic": False, "size": 12}},
        {"question": "", "answer": "", "is_correct": False, "note": "not answered"},
    ):
        yield Text("JSON: equal objects", json.dumps([record] * n))
        yield Text("JSON: equal objects", json.dumps([record] * n, indent=rng.choice([2, 4])))
        yield Text("JSON: equal objects", "".join(json.dumps(record) + "\n" for _ in range(n)))
        numbered = [{"id": i, **record} for i in range(n)]
        yield Text("JSON: numbered objects", json.dumps(numbered))
        yield Text("JSON: numbered objects", json.dumps(numbered, indent=4))
    yield Text("YAML", f"- name: {name}\n  status: active\n  note: none\n" * n)
    yield Text("XML", f'<item name="{name}">\n  <value>0</value>\n  <unit>none</unit>\n</item>\n' * n)
    yield Text(
        "log", "".join(f"2025-11-{1 + i % 30:02} 12:00:{i % 60:02} INFO request done in {i} ms\n" for i in range(n))
    )
    yield Text("log", "".join(f"[{i:05}] INFO: connection to {name} closed, trying again\n" for i in range(n)))
    yield Text("log", "".join(f"epoch {i}: loss 0.0000, accuracy 1.0000\n" for i in range(n)))
    yield Text("log", "".join(f"GET /static/{rng.choice(_NAMES)}.png HTTP/1.1 200 0\n" for _ in range(n)))
    box = [rng.randint(0, 999) for _ in range(4)]
    yield Text("coordinates", ", ".join(f"({rng.randint(0, 999)}, {rng.randint(0, 999)})" for _ in range(4 * n)))
    yield Text("coordinates", ", ".join("(0, 0)" for _ in range(4 * n)))
    yield Text("coordinates", "".join(f"{box}\n" for _ in range(n)))
    yield Text(
        "coordinates", "".join(f"The object {i} is at [{box[0] + i}, {rng.randint(0, 999)}].\n" for i in range(n))
    )
    yield Text(
        "coordinates", "".join(f"<box>({rng.randint(0, 999)},{box[1]}),({box[2]},{box[3]})</box>\n" for _ in range(n))
    )
    yield Text(
        "numbered steps",
        "".join(f"Step {i}: multiply {i} by {rng.randint(1, 9)}, then add it to the total.\n" for i in range(n)),
    )
    yield Text("numbered steps", "".join(f"{i}. {field}: the cell is empty.\n" for i in range(1, n)))
    yield Text(
        "numbered steps", "".join(f"Row {i}: {rng.choice(_NAMES)} was present on all days.\n" for i in range(1, n))
    )
    yield Text("numbered steps", "".join(f"{i}. {rng.choice(_NAMES)}\n" for i in range(1, 3 * n)))
    yield Text("counting", ", ".join(map(str, range(1, 4 * n))))
    yield Text("counting", " ".join(map(str, range(3 * n, 0, -1))))
    things = ", ".join(itertools.repeat(rng.choice(["car", "apple", "person", "chair"]), min(n, 60)))
    yield Text("counting", f"I see {things}: that makes {min(n, 60)}.")


def _code(rng: random.Random) -> Iterator[Text]:
    n = rng.randint(20, 120)
    for value in ("1", "0", "-1", "0.5", "0.25", "1e-3", "None", "True", '""', "[]", "(0, 0)", "255"):
        size = n if value in ("1", "0", "-1", "255", '""', "[]", "(0, 0)", "0.5", "0.25", "1e-3") else min(n, 90)
        yield Text("list of equal values", f"values = [{', '.join([value] * size)}]\n")
    for size in (49, 200, 600):
        yield Text("list of equal values", f"values = {[1] * size}\n")
    yield Text("list of equal values", "values = [\n" + "    0,\n" * n + "]\n")
    yield Text("list of equal values", f"labels = {[i % 3 for i in range(n)]}\n")
    yield Text("list of equal values", f"x = [{', '.join('abc'[i % 3] + str(i) for i in range(n))}]\n")
    imports = "import numpy as np\nimport cv2\nfrom PIL import Image\nimport matplotlib.pyplot as plt\n"
    steps = "".join(
        f"```python\n{imports}image = Image.open('image_{i}.jpg')\n"
        f"image.crop(({i}, 0, {9 * i}, {rng.randint(99, 999)}))\n```\n"
        f"The crop of the {rng.choice(_NAMES)} shows {rng.choice(_NAMES)} and {rng.choice(_NAMES)}.\n"
        for i in range(rng.randint(2, 8))
    )
    yield Text("code: repeated imports", steps)
    yield Text(
        "code: repeated imports",
        "".join(f"from package.{rng.choice(_NAMES)} import {rng.choice(_NAMES)}\n" for _ in range(n)),
    )
    name = rng.choice(_NAMES)
    yield Text(
        "code: boilerplate",
        "".join(f"    def get_{field.lower()}(self):\n        return self._{field.lower()}\n\n" for field in _FIELDS),
    )
    yield Text(
        "code: boilerplate",
        "".join(f"        self.assertEqual(parse({rng.choice(_NAMES)!r}), {rng.randint(0, 9)})\n" for _ in range(n)),
    )
    yield Text("code: boilerplate", "".join(f"    if value == {i}:\n        return None\n" for i in range(n)))
    yield Text("code: boilerplate", f"turtle.forward(100)\nturtle.right({rng.choice([10, 36, 144])})\n" * 36)
    yield Text("code: boilerplate", f"draw.rectangle(box, outline='red')\n{name}.append(box)\n" * 20)
    yield Text("code: boilerplate", "plt.figure()\nplt.imshow(image)\nplt.show()\n" * 12)
    yield Text("code: boilerplate", '<option value="">Select an option</option>\n' * 30)
    yield Text("code: boilerplate", "try:\n    pass\nexcept Exception:\n    pass\n" * 15)
    yield Text("code: boilerplate", "INSERT INTO people (name, age) VALUES (NULL, NULL);\n" * 30)
    statements = (f"ALTER FUNCTION {name}_{rng.choice(_NAMES)}(citext, citext) PARALLEL SAFE;\n" for _ in range(40))
    yield Text("code: boilerplate", "".join(statements))


def _dumps(rng: random.Random) -> Iterator[Text]:
    size = rng.randint(64, 1024)
    yield Text("base64", base64.b64encode(rng.randbytes(4 * size)).decode())
    yield Text("base64", base64.b64encode(bytes(size)).decode())
    for data in (rng.randbytes(size), bytes(size), bytes([255]) * size):
        groups = data.hex(" ", 2).split(" ")
        lines = [groups[i : i + 8] for i in range(0, len(groups), 8)]
        shown = "." * 16
        yield Text("hex dump", "".join(f"{16 * i:08x}: {' '.join(line)}  {shown}\n" for i, line in enumerate(lines)))
        yield Text("hex dump", "".join(f"{16 * i:08x}  {' '.join(line)}  |{shown}|\n" for i, line in enumerate(lines)))
        yield Text("hex dump", ", ".join(f"0x{byte:02x}" for byte in data[:256]))
        yield Text("hex dump", "".join(" ".join(line) + "\n" for line in lines))
        yield Text("binary", " ".join(f"{byte:08b}" for byte in data[:64]))
    yield Text("binary", "0" * 120 + "1")
    width, height = rng.randint(4, 40), rng.randint(4, 30)
    for dot in ".#*- 0":
        yield Text("ASCII art", (dot * width + "\n") * height)
        yield Text("ASCII art", (f"{dot} " * width + "\n") * height)
        yield Text("ASCII art", "".join(dot * i + "\n" for i in range(1, height)))
    board = [["#" if (i + j) % 2 else "." for j in range(width)] for i in range(height)]
    yield Text("ASCII art", "\n".join(" ".join(row) for row in board))
    yield Text("ASCII art", f"+{'-' * width}+\n" + f"|{' ' * width}|\n" * height + f"+{'-' * width}+\n")
    yield Text("ASCII art", ("+---" * width + "+\n" + "|   " * width + "|\n") * min(height, 9))
    yield Text("rules", "-" * rng.randint(10, 100) + "\n" + "=" * rng.randint(10, 100) + "\n" + "_" * 200 + "\n")
    letters = "".join(rng.choice(string.ascii_uppercase) for _ in range(size))
    yield Text("letters", "\n".join(" ".join(letters[i : i + 12]) for i in range(0, len(letters), 12)))


def _progress(rng: random.Random) -> Iterator[Text]:
    """Step after step, each of which finds something out."""
    n = rng.randint(12, 28)
    values = [rng.randint(1, 99) for _ in range(n)]
    sums = list(itertools.accumulate(values, initial=0))
    first, second = rng.sample(_NAMES, n), rng.sample(_NAMES, n)
    steps = [(i + 1, values[i], sums[i], sums[i + 1], first[i], second[i]) for i in range(n)]
    for kind, line in (
        ("arithmetic", "Step {i}: {total} + {value} = {after}.\n"),
        ("arithmetic", "Step {i}: Add {value} to the running total of {total}, which gives {after}.\n\n"),
        ("arithmetic", "In row {i}, the value is {value}, so the sum so far is {after}. "),
        ("arithmetic", "{i}. ${total} + {value} = {after}$\n"),
        ("arithmetic", "\u7b2c{i}\u6b65\uff1a{total}\u52a0\u4e0a{value}\u7b49\u4e8e{after}\u3002\n"),
        ("counting things", "{i}. A {name} at the left of the {other}, at about ({value}, {after}).\n"),
        ("counting things", "The next one is the {name} beside the {other}, which makes {i} so far. "),
        ("counting things", "- Item {i}: {name} ({other}), seen.\n"),
        ("reading", 'Line {i} of the sign reads "{name} {other}". '),
        ("reading", "In the picture number {i}, the {name} is to the left of the {other}.\n"),
        ("reading", "The {name} is next to the {other}, and the {other} is not what the question asks for. "),
        ("reading", "Is it the {name}? No, the {name} {why}. Is it the {other}? No, it {because}. "),
        ("answers to a list of questions", "{i}. \\boxed{{{letter}}}\n"),
        ("answers to a list of questions", "Question {i}: the answer is {letter}, because of the {name}.\n"),
        ("answers to a list of questions", "{i}. {letter}\n"),
    ):
        text = "".join(
            line.format(
                i=i,
                value=value,
                total=total,
                after=after,
                name=name,
                other=other,
                letter=rng.choice("ABCD"),
                **{k: rng.choice(_REASONS) for k in ("why", "because")},
            )
            for i, value, total, after, name, other in steps
        )
        yield Text(f"steps: {kind}", text)
    number = rng.randint(10**5, 10**6)
    yield Text(
        "steps: division",
        "".join(f"{number >> i} / 2 = {number >> i + 1}, rest {number >> i & 1}. " for i in range(18)),
    )
    letters = "".join(rng.choice(string.ascii_lowercase) for _ in range(n))
    yield Text(
        "steps: spelling", "".join(f"The letter number {i + 1} is '{letter}'. " for i, letter in enumerate(letters))
    )
    yield Text(
        "steps: spelling", "".join(f"{letter} is not r. " if letter != "r" else "r is one. " for letter in letters)
    )


def _truths(rng: random.Random) -> Iterator[Text]:
    """Lists of values that are words."""
    n = rng.randint(60, 300)
    for values in (
        ("True", "False"),
        ("true", "false"),
        ("None",),
        ("null",),
        ("True", "False", "False", "True", "None"),
    ):
        cells = [values[i % len(values)] for i in range(n)]
        yield Text("list of truth values", f"flags = [{', '.join(cells)}]")
        if len(values) > 1:  # one token over and over is stopped, whatever it is
            yield Text("list of truth values", f"[{' '.join(cells)}]")
        yield Text("list of truth values", ",\n".join(cells))


def _listed(rng: random.Random) -> Iterator[Text]:
    """Lists and forms of speech in which lines resemble each other."""
    yield from _truths(rng)
    n = rng.randint(15, 60)
    bases = "".join(rng.choice("ACGT") for _ in range(60 * n))
    yield Text("DNA", "".join(f"{bases[i : i + 60]}\n" for i in range(0, len(bases), 60)))
    yield Text("DNA", f"The sequence is {bases[:600].lower()}.")
    yield Text("DNA", "CAG" * rng.randint(10, 60) + bases[:120])
    numbers = [rng.randint(0, 10**6) for _ in range(8 * n)]
    yield Text("numbers", ", ".join(map(str, numbers)))
    yield Text("numbers", "\n".join(f"{number / 1e6:.6f}" for number in numbers))
    yield Text("numbers", "\n".join(f"{number:,}" for number in sorted(numbers)))
    for line in (
        "Saint {name}, pray for us.\n",
        "From all {name} and {other}, good Lord, deliver us.\n",
        "For the {name}, let us pray to the Lord. Lord, have mercy.\n",
    ):
        picks = [(rng.choice(_NAMES), rng.choice(_NAMES)) for _ in range(n)]
        yield Text("litany", "".join(line.format(name=name, other=other) for name, other in picks))
    answers = ("Strongly agree", "Agree", "Neutral", "Disagree", "Strongly disagree")
    yield Text(
        "survey", "".join(f"{i}. The {rng.choice(_NAMES)} was helpful. {' / '.join(answers)}\n" for i in range(1, n))
    )
    yield Text(
        "survey", "".join(f"{rng.choice(_NAMES)},{rng.choice(answers)},{rng.choice(answers)}\n" for _ in range(n))
    )
    yield Text("survey", "".join(f'"{rng.choice(_NAMES)}","{rng.choice(answers)}","N/A"\n' for _ in range(n)))
    names = rng.sample(_NAMES, 24)
    for line in (
        "The {0} is made of {1} and is found near the {2}.\n",
        "Return the {0} of the {1}, or None where there is no {2}.\n",
        "Fixed a bug in the {0} that made the {1} fail when the {2} was empty.\n",
        "Der {0} steht neben dem {1}, und der {1} geh\u00f6rt zu {2}.\n",
        "Le {0} se trouve \u00e0 c\u00f4t\u00e9 de {1}, et non pas dans {2}.\n",
        "El {0} est\u00e1 al lado de {1}, pero no en {2}.\n",
        "Na zdj\u0119ciu {0} stoi obok {1}, a {2} jest za drzwiami.\n",
        "\u56fe\u7247\u4e2d\u7684{0}\u5728{1}\u7684\u5de6\u8fb9\uff0c\u800c{2}\u5728\u53f3\u8fb9\u3002\n",
        "写真の{0}は{1}の隣にあり、{2}は見えません。\n",
        "في الصورة {0} بجانب {1} وليس {2}.\n",
    ):
        yield Text("sentences of one form", "".join(line.format(*rng.sample(names, 3)) for _ in range(n)))
    yield Text(
        "subtitles", "".join(f"{i}\n00:00:{i:02},000 --> 00:00:{i + 1:02},000\n[music]\n\n" for i in range(1, n))
    )
    yield Text("playlist", "".join(f"{i}. {rng.choice(names)} - {rng.choice(names)} (3:{i:02})\n" for i in range(1, n)))
    yield Text("dialogue", "".join(f'"{rng.choice(names)}?" he asked. "No," she said. ' for _ in range(n)))
    yield Text("dialogue", "".join(f"A: Is it the {rng.choice(names)}?\nB: No, it is not.\n" for _ in range(n)))
    yield Text(
        "SQL",
        "".join(
            f"CREATE FUNCTION {name}_{i}({name}, {name})\nRETURNS bool\nAS 'MODULE_PATHNAME'\nLANGUAGE C STRICT;\n\n"
            for i, name in enumerate(names)
        ),
    )
    yield Text(
        "SQL",
        "".join(f"ALTER TABLE {name} ADD COLUMN {rng.choice(names)} INTEGER NOT NULL DEFAULT 0;\n" for name in names),
    )


def _verses() -> Iterator[Text]:
    # No song that counts in digits, such as "99 bottles": that is a loop with a counter, and stopped as one.
    numbers = ["No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten"]
    bottles = ""
    for i in range(10, 0, -1):
        line = f"{numbers[i]} green bottle{'s' * (i > 1)} hanging on the wall,\n"
        rest = f"{numbers[i - 1].lower()} green bottle{'s' * (i != 2)}"
        bottles += (
            f"{line * 2}And if one green bottle should accidentally fall,\nThere'll be {rest} hanging on the wall.\n\n"
        )
    yield Text("poem with a refrain", bottles)
    gifts = (
        "a partridge in a pear tree",
        "two turtle doves",
        "three French hens",
        "four calling birds",
        "five gold rings",
        "six geese a-laying",
        "seven swans a-swimming",
        "eight maids a-milking",
        "nine ladies dancing",
        "ten lords a-leaping",
        "eleven pipers piping",
        "twelve drummers drumming",
    )
    days = _words("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth")
    yield Text(
        "poem with a refrain",
        "".join(
            f"On the {day} day of Christmas my true love sent to me\n" + ",\n".join(reversed(gifts[: i + 1])) + ".\n\n"
            for i, day in enumerate(days)
        ),
    )
    built = [
        "the house that Jack built",
        "the malt that lay in",
        "the rat that ate",
        "the cat that killed",
        "the dog that worried",
        "the cow with the crumpled horn that tossed",
        "the maiden all forlorn that milked",
        "the man all tattered and torn that kissed",
        "the priest all shaven and shorn that married",
        "the cock that crowed in the morn that woke",
        "the farmer sowing his corn that kept",
    ]
    yield Text("poem with a refrain", "".join(f"This is {' '.join(reversed(built[: i + 1]))}.\n\n" for i in range(11)))
    monkeys = (
        f"{number} little monkeys jumping on the bed,\nOne fell off and bumped his head.\nMama called the doctor and "
        "the doctor said,\nNo more monkeys jumping on the bed!\n\n"
        for number in numbers[5:0:-1]
    )
    yield Text("poem with a refrain", "".join(monkeys))
    boat = "Row, row, row your boat,\nGently down the stream.\n"
    yield Text("poem with a refrain", f"{boat}Merrily, merrily, merrily, merrily,\nLife is but a dream.\n\n" * 2)
    wheels = [
        ("wheels", "go round and round"),
        ("wipers", "go swish, swish, swish"),
        ("horn", "goes beep, beep, beep"),
        ("driver", "says move on back"),
        ("people", "go up and down"),
        ("babies", "cry wah, wah, wah"),
    ]
    yield Text(
        "poem with a refrain",
        "".join(
            f"The {who} on the bus {does},\n{does.split(' ', 1)[1]},\n{does.split(' ', 1)[1]}.\n"
            f"The {who} on the bus {does},\nall through the town.\n\n"
            for who, does in wheels
        ),
    )
    chorus = "Blow the man down, bullies, blow the man down!\nWay, hey, blow the man down!\n"
    lines = (
        "Come all ye young fellows that follow the sea",
        "I'll sing you a song of the life on the wave",
        "As I was out walking down Paradise Street",
        "A pretty young maiden I chanced for to meet",
    )
    yield Text(
        "poem with a refrain",
        "".join(f"{line},\n{chorus}And please pay attention and listen to me,\n{chorus}\n" for line in lines),
    )
    yield Text(
        "poem with a refrain", ("Holy, holy, holy, Lord of all,\nheaven and earth are full of your glory.\n") * 3
    )
    verse = (
        "I left my home when I was young,\nwith half a song upon my tongue,\nand every town that I passed through\n"
        "had someone there who sang it too.\n\n"
    )
    for refrain in (
        "Give us a song of peace tonight,\nsing it low and sing it bright,\nover the water, over the hill,\nuntil the "
        "whole wide world is still.\n",
        "Hey now, lady, don't you cry,\nthe morning sun will dry your eye,\nthe road is long, the road is wide,\nand "
        "I'll be walking by your side.\n",
        "Oh, the river runs down to the sea,\nand it carries my heart back to me.\n",
        "Who are we? The boys in blue!\nWhat do we do? We win for you!\n",
        "Der Wind, der weht, der Fluss, der flie\u00dft,\nund alles, was du siehst, ist das, was bleibt.\n",
        "Na na na na, na na na na,\nhey hey hey, goodbye.\n",
    ):
        yield Text("refrain five times", f"{verse}{refrain * 5}\n{verse}")
        yield Text("refrain five times", refrain * 5)


def _words(text: str) -> list[str]:
    return text.split()


_NAMES = _words(
    "alpha beta gamma delta Maria Thomas Ahmed Yuki Elena garden window bridge river station market valley engine "
    "orange purple silver marble copper lantern harbor meadow pencil saddle ticket violin walnut yellow zebra"
)
_REASONS = ("has the wrong color", "is too small", "stands behind the wall", "does not move", "was not asked for")
_FIELDS = _words("Name Age Address Phone Email City Country Date Signature Comment Amount Total")


# ---- loops -------------------------------------------------------------------------------------------------

_OPENINGS = (
    "To answer the question I first look at the whole picture. There is a street with a red car, two people who wait "
    "at the corner and a sign above the door of a shop. The letters on the sign are small, so I should look closer. ",
    "The image shows a table with several rows of numbers, and the question asks for the sum of the second column. Let "
    "me read the values one after the other and add them up.\n\n",
    "Okay, so the question is about the color of the umbrella. In the middle of the image there is a woman, and behind "
    "her I can see a bench, a tree and a small dog that looks at the camera. ",
)

_PHRASES = {
    "word": ["no ", "the ", "very ", "and ", "red ", "image "],
    "word and mark": ["no, ", "yes. ", "Wait, ", "Hmm... ", "ha ", "Yes!\n", "okay, okay. ", "blue, "],
    "joined words": [
        "left-right-",
        "left - right - ",
        "yes / no / ",
        "up \u2192 down \u2192 ",
        "red-green-blue-",
        "north -> east -> south -> west -> ",
        "in-out-in-out, ",
    ],
    "phrase": [
        "of the image ",
        "in the top left corner of the ",
        "I think that ",
        "and then it is a ",
        "the color of the car is ",
        "red and blue and ",
        "more and more ",
        "on the left side, ",
        "the sign, the door, ",
    ],
    "sentence": [
        "I need to look at the image again. ",
        "The answer is B. ",
        "The sign in the picture is red, so I crop the region around it and read the letters. ",
        "The car is red.\n",
        "So the final answer must be the second one.\n\n",
        "There are three people in the image, and two of them wear a hat.\n",
        "The number of cars is 3. ",
        'It says "open" on the door. ',
        "- The umbrella is blue.\n",
        "**Therefore**, the woman holds the umbrella.\n",
        "\u56fe\u7247\u4e2d\u6709\u4e00\u53ea\u732b\u3002",
    ],
    "wait, let me check": [
        "Wait, let me check again. ",
        "Wait, let me check.\n\n",
        "Wait, no. Let me check the coordinates once more. ",
        "But wait, maybe the question asks for the other one. Let me look at the image again.\n\n",
        "Hmm, that is not right. Wait, let me think about it again. ",
        "Let me verify this. Actually, wait. ",
    ],
    "paragraph": [
        "The crop does not show the sign clearly. I should enlarge the region and improve the contrast so that the "
        "letters can be read. After that I compare them with the letters in the question.\n\n",
        "First, I look at the left side of the image, where a man stands next to a bicycle. He wears a green jacket "
        "and holds a bag. Then I look at the right side, where a woman sits on a bench and reads a book. Neither of "
        "them looks at the camera, so the question must be about somebody else.\n\n",
        "Wait. Let me check the coordinates of the plate once more, since this crop shows only the ground. The plate "
        "should be below the lights of the car, and the car is in the lower half of the picture. So I move the box "
        "down and make it a little larger. Now the plate should be inside of it. I will print the size of the new crop "
        "to be sure that it is not empty, and then I read the letters and the digits on it.\n\n",
    ],
    "counting": [
        "one, two, three, four, five, ",
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ",
        "1 2 3 4 5 6 7 8 9 ",
        "The first is red, the second is blue, the third is green. ",
        "3",
    ],
    "marks": ["!", "?", ".", "-", "=", "*", "_", "|", "\n", "!? ", ". ", "... ", "\U0001f600"],
    "boxed": [
        "The final answer is $\\boxed{5}$.\n\n",
        "\\boxed{B}\n",
        "\\boxed{5} ",
        "**Final Answer**\n\\boxed{12}\n\n",
        "Therefore, the answer is \\boxed{\\text{Paris}}. ",
        "$$\\boxed{3.14}$$\n",
    ],
    "speech": [
        'He said "yes" and she said "yes" and ',
        '"The door is open," he said. ',
        "\u201cNo,\u201d she said. ",
        'The label reads "EXIT". ',
        "It is a 'stop' sign. ",
    ],
    "code comment": [
        "# Crop the image to the region of the sign\n",
        "    # Now we need to look at the result again\n",
        "# Let me check the size of the image first.\n",
        "// the value is not used here\n",
        "# Load the image\n# Crop the image\n# Save the image\n",
    ],
}

_WITHIN = {
    "within a box": "So the answer is $\\boxed{\\text{",
    "within quotes": 'The sign on the wall reads "',
    "within JSON": '{"question": 3, "answer": "',
    "within a table": "| Name | Color | Note |\n|---|---|---|\n| car | red | ",
    "within code": "```python\nimport cv2\nimage = cv2.imread(path)\nprint('",
}

_COUNTERS = {
    "numbered list": [
        "{i}. The cat sat. ",
        "{i}. The sign on the door is red.\n",
        "Step {i}: I look at the image again.\n",
    ],
    "numbered sentence": [
        "Attempt {i}: the region is too small to read, so I enlarge it by a factor of two and look again.\n",
        "In try number {i} the letters are still not clear, and I crop the image once more. ",
        "This is the {word} time that I look at the picture, and I still cannot see the sign. ",
    ],
    "numbered paragraph": [
        "Let me look at the image for the {word} time. There is a man next to a bicycle, and a woman sits on a bench. "
        "The man holds a bag, and the woman reads a book. Neither of them looks at the camera.\n\n",
    ],
    "edited sentence": [
        "The {noun} is next to the door, and the question asks for the color of what stands next to the window. ",
        "Wait, let me check the {noun} again, since the crop that I made before does not show what is asked for. ",
    ],
}
_NOUNS = _words("car sign dog bench tree woman man bicycle bag book hat plate lamp")
_ORDINALS = _words(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth twentieth"
)
_CHARACTERS = 6_000


def loops() -> Iterator[Loop]:
    """Exact loops, each after every opening."""
    for kind, phrases in _PHRASES.items():
        for phrase, opening in itertools.product(phrases, _OPENINGS):
            # A run of one mark becomes few, long tokens.
            characters = _CHARACTERS * (5 if len(phrase) == 1 else 1)
            yield Loop(kind, opening, phrase, phrase * (characters // len(phrase)))
    for (kind, begun), phrase in itertools.product(_WITHIN.items(), ("the red car, ", *_PHRASES["phrase"])):
        yield Loop(kind, _OPENINGS[0] + begun, phrase, phrase * (_CHARACTERS // len(phrase)))


def near_loops() -> Iterator[Loop]:
    """Loops of which no two rounds are equal, each after every opening: an edit in ten tokens at most, or a counter."""
    for kind, phrases in _COUNTERS.items():
        for phrase, opening in itertools.product(phrases, _OPENINGS):
            rng = random.Random(0)
            rounds = [
                phrase.format(i=i + 1, word=_ORDINALS[i % len(_ORDINALS)], noun=rng.choice(_NOUNS))
                for i in range(2 * _CHARACTERS // len(phrase))
            ]
            yield Loop(kind, opening, rounds[0], "".join(rounds[1:]))
    for share, opening in itertools.product((0.05, 0.1), _OPENINGS):
        for words in (_words(opening)[:20], _words(_PHRASES["paragraph"][0])):
            rng = random.Random(0)
            rounds = [" ".join(words) + " "]
            while sum(map(len, rounds)) < 2 * _CHARACTERS:
                for site in rng.sample(range(len(words)), round(share * len(words))):
                    words[site] = rng.choice(_NAMES)
                rounds.append(" ".join(words) + " ")
            yield Loop(f"{share:.0%} of words edited", opening, rounds[0], "".join(rounds[1:]))


# ---- rates -------------------------------------------------------------------------------------------------


def hit(
    tokens: Sequence[int], config: RepetitionConfig | None = None, classes: NDArray[np.uint8] | None = None
) -> RepetitionHit | None:
    """What the detector says of the tokens."""
    detector = RepetitionDetector(config or RepetitionConfig(), capacity=1, classes=classes)
    slot = detector.open()
    detector.push(np.full(len(tokens), slot, np.int32), np.array(tokens, np.int32))
    return detector.hit(slot)


def hits(
    texts: Sequence[str], config: RepetitionConfig | None = None, *, with_vocabulary: bool = True
) -> list[RepetitionHit | None]:
    """What the detector says of each text."""
    tokenizer = qwen_like()
    detector = RepetitionDetector(config or RepetitionConfig(), 1, tokenizer.classes if with_vocabulary else None)
    slot, found = detector.open(), []
    for tokens in tokenizer.batch(texts):
        detector.restart(slot)
        detector.push(np.full(len(tokens), slot, np.int32), np.array(tokens, np.int32))
        found.append(detector.hit(slot))
    return found


def tokens_to_catch(loops: Sequence[Loop], config: RepetitionConfig | None = None) -> list[tuple[int, int] | None]:
    """Tokens from the start of each loop, and from where it first repeats, to the one that fires; None if none does."""
    starts = qwen_like().batch([loop.opening for loop in loops])
    repeats = qwen_like().batch([loop.opening + loop.once for loop in loops])
    found = hits([loop.opening + loop.once + loop.again for loop in loops], config)
    return [
        None if one is None else (one.index + 1 - len(start), one.index + 1 - len(repeat))
        for one, start, repeat in zip(found, starts, repeats, strict=True)
    ]


def main() -> None:
    """Prints both rates."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0])
    total = counts["all"]
    for corpus in ([*ordinary(), *published_traces()], list(installed())):
        texts = [text for _, text in corpus]
        lengths = map(len, qwen_like().batch(texts))
        exact, all_rules = hits(texts, RepetitionConfig(near_tokens=0)), hits(texts)
        unknown = hits(texts, with_vocabulary=False)
        for (kind, _), length, one, other, third in zip(corpus, lengths, exact, all_rules, unknown, strict=True):
            is_near = other is not None and other.rule == "near"
            for row in (counts[kind.split(":")[0]], total):
                for column, more in enumerate((1, length, one is not None, is_near, third is not None)):
                    row[column] += more
    print(f"{'honest texts':34} {'texts':>6} {'tokens':>9} {'exact':>6} {'near':>5} {'without a vocabulary':>21}")
    for kind, row in [*((kind, row) for kind, row in counts.items() if kind != "all"), ("all", total)]:
        print(f"{kind:34} {row[0]:6} {row[1]:9,} {row[2]:6} {row[3]:5} {row[4]:21}")
    for title, found in (("loops", list(loops())), ("loops with edits", list(near_loops()))):
        print(f"\n{title:34} {'loops':>6} {'caught':>7}   tokens from the start, and from the first repeat")
        print(f"{'':49} {'mean':>6} {'worst':>6} {'mean':>6} {'worst':>6}")
        caught: dict[str, list[tuple[int, int] | None]] = defaultdict(list)
        for loop, delay in zip(found, tokens_to_catch(found), strict=True):
            caught[loop.kind].append(delay)
        caught["all"] = [delay for delays in caught.values() for delay in delays]
        for kind, delays in caught.items():
            starts, repeats = np.array([delay for delay in delays if delay is not None] or [(0, 0)]).T
            print(f"{kind:34} {len(delays):6} {len(delays) - delays.count(None):7} ", end="")
            print(f"{starts.mean():6.0f} {starts.max():6} {repeats.mean():6.0f} {repeats.max():6}")


if __name__ == "__main__":
    main()
