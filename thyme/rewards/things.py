"""Things of which none is another: "7 dogs" is no answer to how many cats there are, whatever the number.

Only what cannot be meant by another word is here, and no word for more than one kind: "7 animals", "7 of them" and "7
pets" may be cats. What is not here excludes nothing.
"""

from __future__ import annotations

import re

MAX_CHARACTERS = 500

# One kind a line, with all its names: man and boy may be one person. Behind a colon, plurals that no rule makes.
_KINDS = """
cat kitten
dog puppy
horse pony foal
cow bull calf ox : calves oxen
sheep lamb : sheep
goat
pig piglet
chicken hen rooster chick
duck duckling
goose gosling : geese
elephant
giraffe
zebra
lion
tiger
bear
monkey
penguin
rabbit bunny
frog
snake
turtle tortoise
butterfly
spider
fish : fish
car
bus
train
airplane plane
bicycle bike
motorcycle motorbike
boat ship
chair
table
bed
fork
knife : knives
spoon
bottle
book
umbrella
balloon
apple
banana
orange
pear
strawberry
lemon
carrot
tomato
potato
pizza
circle
triangle
star
man boy gentleman : men gentlemen
woman girl lady : women
"""
_STOP = (
    "are is were was am be do does did can could will would have has had in on at of with near by under behind between "
    "there appear stand sit visible shown seen you i we they it the a an and or that which who to from per"
)
_STOPS = frozenset(_STOP.split())
_ASKED = re.compile(r"\bhow many ((?:of (?:the|these|those) )?(?:[a-z-]+ ?){1,5})", re.I)
_NUMBER = r"\d[\d,]*|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
_COUNTED = re.compile(rf"(?<![\w.,-])({_NUMBER}) ([a-z]+)(?: ([a-z]+))?")


def counts_other_things(answer: str, question: str) -> bool:
    """Whether an answer gives the number of things that are not those a question asks the number of.

    Args:
        answer: a folded text (`thyme.rewards.spelling`).
        question: a normal text.
    """
    if max(len(answer), len(question)) > MAX_CHARACTERS or _asked(question) is None:
        return False
    mentioned = {_KIND_OF.get(word) for word in re.findall(r"[a-z]+", question.casefold())}
    counted = [kind for number, *words in _COUNTED.findall(answer) if (kind := _counted(number, words)) is not None]
    return bool(counted) and not mentioned.intersection(counted)


def _asked(question: str) -> int | None:
    """The kind of the noun behind "how many", the last word before a verb or a preposition."""
    match = _ASKED.search(question.casefold())
    if match is None:
        return None
    words = re.sub(r"^of (?:the|these|those) ", "", match[1]).split()
    end = next((i for i, word in enumerate(words) if word in _STOPS), len(words))
    return _KIND_OF.get(words[end - 1]) if end else None


def _counted(number: str, words: list[str]) -> int | None:
    """The kind of the noun behind a number, alone or behind one adjective. "7 bus stops" are no buses."""
    for i, word in enumerate(words):
        if word in _STOPS or (i and words[0] in _STOPS):
            return None
        if word in (_SINGULAR if number in ("1", "one") else _PLURAL):
            return _KIND_OF[word]
    return None


def _plural(noun: str) -> str:
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search(r"(?:s|x|ch|sh|[^aeiou]o)$", noun) else "s")


def _forms() -> tuple[dict[str, int], dict[str, int]]:
    """Names in the singular and in the plural -> kind."""
    singular: dict[str, int] = {}
    plural: dict[str, int] = {}
    for kind, line in enumerate(_KINDS.strip().splitlines()):
        names, _, irregular = line.partition(":")
        singular |= dict.fromkeys(names.split(), kind)
        plural |= dict.fromkeys(irregular.split() + [_plural(name) for name in names.split()], kind)
    return singular, plural


_SINGULAR, _PLURAL = _forms()
_KIND_OF = _SINGULAR | _PLURAL
