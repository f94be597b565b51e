"""Phases: literals of code against Python's own tokenizer, declared tags against a scan, draws against their law."""

import io
import re
import tokenize
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from thyme.engine import Completion, Engine, Phases, PhaseSampling, SamplingParams, TagPair, TokenKind
from thyme.engine.literals import PLACES, STRINGS, Lex, begins_number, step
from thyme.engine.phases import ANSWER, CODE, NUMBER, STRING, TEXT
from thyme.engine.tags import TagAutomaton, TagEvent
from thyme.model import Model, ModelConfig, build

THINK = TagPair(name="think", start="<think>", end="</think>")
JSON = TagPair(name="json", start="```json\n", end="```")
FENCE = TagPair(name="fence", start="```text\n", end="```")

SNIPPETS = [
    "s = image.width // 6\nx, y = 3*s, 5*s\nimage = image.crop((x, y, x + s, y + s))\nimage.save('out1.png')\n",
    'box = [10, 20.5, -3, 1e-5, 0x1F, 1_000, .5, 3j]  # at 42, not "7"\nx1 = a2[1:2, ::3] @ b\n',
    "d = {'a': 1, \"b's\": [2, '', \"\"], 'c': ''}\ns = '''long 5 ' '' \\''' 6\n'''\n"
    't = """a " 1 "" b"""\nu = 7\n',
    "def f(n: int = 4) -> float:\n    if n<2: return 1\n    return f(n-1)*n**2 if not n%3 else ~n|8\n",
    "x = (\n    1,\n    2)\nprint(u'{x} 9', r'\\d', b'\\'4', 'a\\\\', 6)\ny = x[0] # 'open\nz = 5\n",
]


class Bytes:
    """A tokenizer of single bytes."""

    vocab_size = 256

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


def oracle(code: str) -> list[str]:
    """Of each character: what Python's tokenizer says that it stands in, behind that token's first character."""
    lines = code.splitlines(keepends=True)
    starts = np.cumsum([0, *map(len, lines)])
    found = ["first"] * len(code)
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type in (tokenize.NUMBER, tokenize.STRING, tokenize.NAME, tokenize.COMMENT):
            begin, end = (starts[row - 1] + column for row, column in (token.start, token.end))
            quotes = re.match(r"[a-z]*('''|\"\"\"|'|\")", token.string) if token.type == tokenize.STRING else None
            for place in range(begin, end):
                inside = place - begin >= (len(quotes[0]) if quotes else 1)
                found[place] = tokenize.tok_name[token.type] if inside else f"{tokenize.tok_name[token.type]} begins"
    return found


@pytest.mark.parametrize("code", SNIPPETS)
def test_the_lexer_agrees_with_pythons(code: str) -> None:
    lex = Lex.SYNTAX
    for place, (character, where) in enumerate(zip(code, oracle(code), strict=True)):
        said = f"{code[:place]!r} then {character!r}: {lex.name}, {where}"
        if where == "NUMBER":
            assert lex is Lex.NUMBER or (lex in PLACES and code[place - 1] in ".-"), said  # 1e-5: the sign begins anew
        elif where == "NUMBER begins":
            after_keyword = re.search(r"return $|else $", code[:place])
            assert lex in PLACES or after_keyword, said
            assert begins_number(code[place : place + 2].encode()) or after_keyword, said
        elif where == "STRING":
            assert lex in STRINGS, said
        else:
            assert lex not in STRINGS or where == "STRING begins", said
            assert lex is not Lex.NUMBER or where == "first", said
            assert (lex in PLACES) <= (where in ("first", "NAME begins", "STRING begins", "COMMENT begins")), said
        lex = step(lex, ord(character))


def phases_of(automaton: TagAutomaton, text: bytes) -> list[int]:
    """The phase that each byte is drawn in, a number at every place of one."""
    _, states, _ = automaton.walk(np.frombuffer(text, dtype=np.uint8))
    return automaton.phases[states].tolist()


def test_literals_are_phases_in_code_alone() -> None:
    automaton = TagAutomaton.compile(Bytes(), Phases(literals=True))
    text = b"x = 3 'a'<code>y = 41+z['b'] #4</code>x = 3 'a'"
    expected = "t" * 15 + "cccnnnnncnss" + "c" * 11 + "t" * 9
    assert "".join("tcnsa"[phase] for phase in phases_of(automaton, text)) == expected
    plain = TagAutomaton.compile(Bytes())
    assert set(phases_of(plain, text)) == {TEXT, CODE}
    assert not plain.is_place.any()


@pytest.mark.parametrize("quoted", ["'", '"', "'''", '"""', "# "])
def test_code_ends_inside_of_an_open_string_or_comment(quoted: str) -> None:
    automaton = TagAutomaton.compile(Bytes(), Phases(literals=True))
    ids = np.frombuffer(f"<code>a = {quoted}b </code>".encode(), dtype=np.uint8)
    _, states, state = automaton.walk(ids)
    assert automaton.step(int(states[-1]), int(ids[-1]))[1] == TagEvent.CODE_END
    assert state == 0


def scan(text: str, pairs: tuple[TagPair, ...]) -> list[tuple[str, ...]]:
    """What is open before each character, by looking for the tag that ends next again and again."""
    found: list[tuple[str, ...]] = []
    is_open: list[str] = []
    since = 0
    for place in range(len(text)):
        found.append(tuple(is_open))
        seen = text[since : place + 1]
        if "code" in is_open:
            hit = seen.endswith("</code>")
            is_open = is_open[:-1] if hit else is_open
        else:
            hit = True
            closing = next((n for n in reversed(is_open) if n != "answer" and seen.endswith(_end(n, pairs))), None)
            opening = next((p for p in pairs if seen.endswith(p.start) and p.name not in is_open), None)
            if closing is not None and not (opening and _end(closing, pairs) not in opening.start):
                is_open = is_open[: is_open.index(closing)]
            elif (
                opening is not None
                and len(is_open) < 2
                and not any(_end(n, pairs) in opening.start for n in is_open if n != "answer")
            ):
                is_open.append(opening.name)
            elif seen.endswith("<code>"):
                is_open = [*_outside(is_open), "code"]
            elif seen.endswith("<answer>") and len(_outside(is_open)) < 2:
                is_open = [*_outside(is_open), "answer"]
            elif seen.endswith("</answer>"):
                is_open = _outside(is_open)
            else:
                hit = False
        if hit:
            since = place + 1
    return found


def _end(name: str, pairs: tuple[TagPair, ...]) -> str:
    return next(pair.end for pair in pairs if pair.name == name)


def _outside(is_open: list[str]) -> list[str]:
    return is_open[: is_open.index("answer")] if "answer" in is_open else is_open


def test_declared_phases_nest_and_come_again(draw: np.random.Generator) -> None:
    pairs = (THINK, JSON, FENCE)
    phases = Phases(declared=pairs)
    automaton = TagAutomaton.compile(Bytes(), phases)
    pieces = [*(tag for pair in pairs for tag in (pair.start, pair.end)), "<code>", "</code>", "<answer>", "</answer>"]
    pieces += ["x", "<", "`", "```", "<th", "ink>", "</", "\n"]
    opened: set[tuple[str, ...]] = set()
    for _ in range(60):
        text = "".join(draw.choice(pieces, 40).tolist())
        expected = scan(text, pairs)
        opened |= set(expected)
        names = [open_[-1] if open_ else "text" for open_ in expected]
        assert [phases.names[number] for number in phases_of(automaton, text.encode())] == names
    assert {(), ("think",), ("json", "think"), ("think", "json", "code"), ("answer", "json")} <= opened


def test_a_phase_that_was_left_open_is_open_in_the_next_round() -> None:
    automaton = TagAutomaton.compile(Bytes(), Phases(declared=(THINK, JSON), literals=True))

    def after(*rounds: str) -> str:
        state = automaton.after(np.frombuffer(text.encode(), dtype=np.uint8) for text in rounds)
        return Phases(declared=(THINK, JSON)).names[automaton.phases[state]]

    assert after() == "text"
    assert after("<think>a<code>x = '</code>") == "think"
    assert after("<think>a<code>x</code>", "b<code>y</code>") == "think"
    assert after("<think>a<code>x</code>", "b</think>c<code>y</code>") == "text"
    assert after("<think>```json\n{<code>1") == "json"
    assert after("<think><answer>7") == "think"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TagPair(name="code", start="<c>", end="</c>"), "a name of its own"),
        (lambda: TagPair(name="a b", start="<c>", end="</c>"), "a name of its own"),
        (lambda: TagPair(name="a", start="<", end="</c>"), "two ASCII characters"),
        (lambda: TagPair(name="a", start="<answer>!", end="</c>"), "a tag of our own"),
        (lambda: Phases(declared=(THINK, THINK)), "declared twice"),
        (lambda: Phases(declared=(THINK, replace(THINK, name="b", start="<think>!"))), "part of the other"),
        (lambda: PhaseSampling(temperature=-1.0), "temperature must be finite"),
        (lambda: PhaseSampling(top_p=0.0), r"top_p must lie in \(0, 1\]"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_end_tag_that_holds_another_start_is_refused() -> None:
    inner = TagPair(name="inner", start="[[", end="]]")
    outer = TagPair(name="outer", start="<o>", end="[[/o")
    with pytest.raises(ValueError, match="both count in outer, and one is part of the other"):
        TagAutomaton.compile(Bytes(), Phases(declared=(inner, outer)))


# Draws.


@pytest.fixture(scope="module")
def words() -> Any:
    """A vocabulary of pieces of code and tags, those of numbers among them."""
    pieces = '\x00|<code>|</code>|<think>|</think>|1|2|37|.5|x|y| |=|(|, |\'|\n|#|*|<answer>|</answer>|-|return |)|"""'

    class Words:
        tokens = tuple(piece.encode() if piece != "\x00" else b"" for piece in pieces.split("|"))
        eos_token_ids = (0,)
        never_sampled_ids = (7,)

        @property
        def vocab_size(self) -> int:
            return len(self.tokens)

        def token_bytes(self, token_id: int) -> bytes:
            return self.tokens[token_id]

    return Words()


@pytest.fixture(scope="module")
def model(words: Any) -> Model:
    text = tiny.text_config(vocab_size=words.vocab_size + 3, max_position_embeddings=4096, initializer_range=0.2)
    return build(ModelConfig(model_type="qwen2", text=text), seed=5)


PHASES = Phases(declared=(THINK,), literals=True)
OWN = {
    "number": PhaseSampling(temperature=0.6, top_k=5),
    "string": PhaseSampling(temperature=1.4, top_p=0.7),
    "think": PhaseSampling(temperature=0.8, min_p=0.05),
}
PARAMS = SamplingParams(
    max_tokens=120,
    code_temperature=0.3,
    phases=OWN,
    seed=0,
    stop_at_tags=False,
    ignore_eos=True,
    repetition=None,
)
TEMPERATURES = {TEXT: 1.0, CODE: 0.3, NUMBER: 0.6, STRING: 1.4, ANSWER: 1.0, 5: 0.8}
LIMITS = {NUMBER: (5, 1.0, 0.0), STRING: (0, 0.7, 0.0), 5: (0, 1.0, 0.05)}


def distribution(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """What one row is drawn from, in float64 by sorting: top_k, then top_p of what is left, then min_p."""
    x = logits.double().numpy() / temperature
    p = np.exp(x - x.max())
    p[7] = 0.0  # banned
    p[25:] = 0.0  # beyond the tokenizer
    order = np.argsort(-p, kind="stable")
    kept = order[: top_k or len(order)]
    share = p[kept] / p[kept].sum()
    kept = kept[: int((np.cumsum(share) - share < top_p).sum())] if top_p < 1 else kept
    out = np.zeros_like(p)
    out[kept] = p[kept]
    out[p < min_p * p.max()] = 0.0
    return out / out.sum()


def chi_square_tail(statistic: float, freedom: int) -> float:
    """P(chi-square >= statistic), the regularized upper incomplete gamma function."""
    return torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), torch.tensor(statistic / 2.0).double()).item()


def run(model: Model, words: Any, make_engine: Any, params: SamplingParams, **config: Any) -> list[Completion]:
    engine: Engine = make_engine(model, processor=words, phases=PHASES, **config)
    return engine.generate([[1, 2]], params)


def test_every_token_is_drawn_in_its_phase_with_its_log_prob(
    model: Model, words: Any, make_engine: Any, score: Any
) -> None:
    automaton = TagAutomaton.compile(words, PHASES)
    found: dict[int, int] = dict.fromkeys(range(6), 0)
    overruled = 0
    for completion in run(model, words, make_engine, replace(PARAMS, n=24)):
        logits = score(model, completion.sequence.token_ids)[1:-1]
        _, states, _ = automaton.walk(np.array(completion.token_ids))
        for t, (token, state) in enumerate(zip(completion.token_ids, states.tolist(), strict=True)):
            likely = logits[t, :25].clone().index_fill_(0, torch.tensor([7]), -torch.inf).argmax()
            phase = int(automaton.phases[state])
            if automaton.is_place[state] and not begins_number(words.token_bytes(int(likely))):
                phase, overruled = CODE, overruled + 1
            assert completion.phases[t] == phase
            assert completion.temperatures[t] == np.float32(TEMPERATURES[phase])
            law = distribution(logits[t], TEMPERATURES[phase], *LIMITS.get(phase, (0, 1.0, 0.0)))
            assert law[token] > 0
            assert completion.logprobs[t] == pytest.approx(np.log(law[token]), abs=2e-4)
            found[phase] += 1
    assert min(found.values()) >= 20 and overruled >= 20, (found, overruled)


@pytest.mark.parametrize(
    ("opening", "phase"),
    [("", TEXT), ("<code>x", CODE), ("<code>(1", NUMBER), ("<code>'x", STRING), ("<answer>", ANSWER), ("<think>x", 5)],
)
def test_draws_follow_the_law_of_their_phase(
    model: Model, words: Any, make_engine: Any, score: Any, opening: str, phase: int
) -> None:
    """One token, 2,000 times, behind the same forced beginning: chi-square against the float64 distribution."""
    ids = [words.tokens.index(piece.encode()) for piece in re.findall(r"</?\w+>|.", opening)]
    engine = make_engine(model, processor=words, phases=PHASES, max_sequences=100, num_blocks=800)
    law = distribution(score(model, [1, 2, *ids, 3])[-2], TEMPERATURES[phase], *LIMITS.get(phase, (0, 1.0, 0.0)))
    counts = np.zeros(len(law))
    params = replace(PARAMS, max_tokens=1)
    for seed in range(0, 2000, 100):
        batch = [engine.add([1, 2, *ids], replace(params, seed=seed + i)) for i in range(100)]
        for sequence in batch:
            sequence.begins_in = engine.automaton.walk(np.array(ids, dtype=np.int64))[2]
        while engine.has_unfinished():
            for completion in engine.step():
                assert completion.phases.tolist() == [phase]
                counts[completion.token_ids[0]] += 1
    assert counts[law == 0].sum() == 0
    rare = law * counts.sum() < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(law[~rare], law[rare].sum()) * counts.sum()
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert len(observed) > 2
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert chi_square_tail(float(statistic), len(observed) - 1) > 1e-4


def test_greedy_syntax_and_drawn_numbers(model: Model, words: Any, make_engine: Any, score: Any) -> None:
    params = replace(PARAMS, n=16, code_temperature=0.0, phases={"number": PhaseSampling(temperature=1.0)})
    differs = 0
    for completion in run(model, words, make_engine, params):
        logits = score(model, completion.sequence.token_ids)[1:-1, :25]
        logits[:, 7] = -torch.inf
        drawn, likely = np.array(completion.token_ids), logits.argmax(-1).numpy()
        code = (completion.phases == CODE) | (completion.phases == STRING)
        np.testing.assert_array_equal(completion.temperatures == 0.0, code)
        np.testing.assert_array_equal(drawn[code], likely[code])
        differs += int((drawn != likely)[completion.phases == NUMBER].sum())
    assert differs > 5


def test_not_adaptive_has_no_phases(model: Model, words: Any, make_engine: Any) -> None:
    params = replace(PARAMS, adaptive=False, n=4)
    for completion in run(model, words, make_engine, params):
        assert set(completion.temperatures.tolist()) == {1.0}
        np.testing.assert_array_equal(completion.kept_mass, 1.0)


def test_phases_change_nothing_where_they_say_nothing(model: Model, words: Any, make_engine: Any) -> None:
    """Engines that tell more phases apart draw the same bits while no phase has anything of its own."""
    params = replace(PARAMS, phases={}, n=8)
    plain = make_engine(model, processor=words).generate([[1, 2]], params)
    for one, other in zip(plain, run(model, words, make_engine, params), strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_array_equal(one.logprobs, other.logprobs)
        np.testing.assert_array_equal(one.temperatures, other.temperatures)
        np.testing.assert_array_equal(one.kinds == TokenKind.CODE, other.kinds == TokenKind.CODE)


def test_requests_with_other_bans_and_phases_share_a_batch(model: Model, words: Any, make_engine: Any) -> None:
    """Each draws what it draws alone, also where its likeliest id is looked for among other ids."""
    asked = [replace(PARAMS, max_tokens=50, seed=s, banned_ids=b) for s in range(2) for b in ((), (5, 7), "default")]  # type: ignore[arg-type]
    asked += [replace(PARAMS, max_tokens=50, phases={}, seed=9)]
    together = make_engine(model, processor=words, phases=PHASES, deterministic=True).generate([[1, 2]] * 7, asked)
    alone = make_engine(model, processor=words, phases=PHASES, deterministic=True)
    for params, completion in zip(asked, together, strict=True):
        (single,) = alone.generate([[1, 2]], params)
        assert single.token_ids == completion.token_ids
        np.testing.assert_array_equal(single.phases, completion.phases)


def test_a_round_after_given_tokens_begins_in_the_phase_that_is_open(
    model: Model, words: Any, make_engine: Any
) -> None:
    engine = make_engine(model, processor=words, phases=PHASES)
    params = replace(PARAMS, stop_at_tags=True, max_tokens=30, n=24)
    group = engine.add_group([1, 2], params, hold=True)
    rounds: dict[int, list[Completion]] = {sequence.id: [] for sequence in group}
    for _ in range(3):
        while engine.has_unfinished():
            for completion in engine.step():
                rounds[completion.sequence.id].append(completion)
        for sequence in group:
            engine.append(sequence, [words.tokens.index(b"<think>"), 9])
    while engine.has_unfinished():
        for completion in engine.step():
            rounds[completion.sequence.id].append(completion)
    began = []
    for completions in rounds.values():
        for place, completion in enumerate(completions):
            state = engine.automaton.after(np.array(c.token_ids) for c in completions[:place])
            assert completion.phases[0] == engine.automaton.phases[state]
            began.append(int(completion.phases[0]))
    assert began.count(5) > 3 and began.count(TEXT) > 30
    for sequence in group:
        engine.release(sequence)


def test_an_unknown_phase_is_refused(model: Model, words: Any, make_engine: Any) -> None:
    engine = make_engine(model, processor=words)
    with pytest.raises(ValueError, match="phase 'number' is not one that the engine was made with: text, code, answer"):
        engine.add([1, 2], PARAMS)


def test_forced_ids_at_places_of_numbers_are_refused(model: Model, words: Any, make_engine: Any) -> None:
    engine = make_engine(model, processor=words, phases=PHASES)
    ids = [words.tokens.index(piece) for piece in (b"<code>", b"(", b"x")]
    params = replace(PARAMS, phases={"number": PhaseSampling(temperature=0.6)})
    with pytest.raises(ValueError, match="give numbers and code one temperature"):
        engine.add([1, 2], params, forced=ids)
    engine.abort(engine.add([1, 2], replace(params, phases={}), forced=ids))
