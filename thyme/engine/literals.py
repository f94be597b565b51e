"""Numbers and strings in code, byte by byte: a lexer of Python small enough to be a table.

What counts is where the *next* token is drawn:

    SYNTAX      anything else
    WORD        inside of a name
    COMMENT     after #, up to the end of the line
    PLACE       where a number may begin: after = ( [ { , + - * / % < > & | ^ ~ and blanks, after : on the same line
    NUMBER      after a digit that began one, while it may go on
    a string    in its quotes: ' " ''' or \"""

A number's first token is of the phase `number` where it is drawn at a PLACE and the most likely id begins a number
(`begins_number`): names come at the same places, and they are syntax. All that is drawn in NUMBER is, the token that
ends it too: where a number ends is part of its value. Of a string that is everything behind its opening quotes, the
closing ones included. A number after a keyword (`return 5`) is begun as syntax and goes on as a number.

The tag that ends the code ends it inside a string and a comment as well. Standard library only.
"""

import re
from enum import IntEnum


class Lex(IntEnum):
    """What the code ends in."""

    SYNTAX = 0
    WORD = 1
    COMMENT = 2
    PLACE = 3
    PLACE_IN_LINE = 4
    """Behind a colon: a line that begins next is no place."""
    NUMBER = 5
    SINGLE = 6
    """In '...'."""
    SINGLE_ESCAPE = 7
    SINGLE_FIRST = 8
    """Behind one ', which may be the first of two or three."""
    SINGLE_SECOND = 9
    """Behind '', an empty string or the beginning of a long one."""
    SINGLES = 10
    """In '''...'''."""
    SINGLES_ESCAPE = 11
    SINGLES_END = 12
    """Behind ' in it."""
    SINGLES_ENDS = 13
    """Behind '' in it."""
    DOUBLE = 14
    """In "...", and so on as above."""
    DOUBLE_ESCAPE = 15
    DOUBLE_FIRST = 16
    DOUBLE_SECOND = 17
    DOUBLES = 18
    DOUBLES_ESCAPE = 19
    DOUBLES_END = 20
    DOUBLES_ENDS = 21


PLACES = frozenset({Lex.PLACE, Lex.PLACE_IN_LINE})
STRINGS = frozenset(lex for lex in Lex if lex >= Lex.SINGLE and lex not in (Lex.SINGLE_SECOND, Lex.DOUBLE_SECOND))
"""Where a string is open for sure; behind two quotes it is rather the empty one."""

_BEFORE_NUMBER = frozenset(b"=([{,+-*/%<>&|^~")
_BLANKS = frozenset(b" \t")
_LINE_ENDS = frozenset(b"\r\n")
_WORD = frozenset(b"_abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789") | frozenset(range(128, 256))
_DIGITS = frozenset(b"0123456789")
_NUMBER = re.compile(rb"\s*[-+~]?\.?[0-9]")
_QUOTES = {ord("'"): Lex.SINGLE, ord('"'): Lex.DOUBLE}


def step(lex: Lex, byte: int) -> Lex:
    """Where the code is after one more byte."""
    if lex >= Lex.SINGLE:
        return _in_string(lex, byte)
    if lex is Lex.COMMENT:
        return Lex.SYNTAX if byte in _LINE_ENDS else Lex.COMMENT
    if lex is Lex.NUMBER and (byte in _WORD or byte == ord(".")):
        return Lex.NUMBER
    if lex is Lex.WORD and byte in _WORD:
        return Lex.WORD
    if byte in _DIGITS:
        return Lex.NUMBER
    if byte == ord(".") and lex in PLACES:
        return lex
    if byte in _WORD:
        return Lex.WORD
    if byte in _QUOTES:
        return Lex(_QUOTES[byte] + 2)
    if byte == ord("#"):
        return Lex.COMMENT
    if byte in _BEFORE_NUMBER:
        return Lex.PLACE
    if byte == ord(":"):
        return Lex.PLACE_IN_LINE
    if lex in PLACES and (byte in _BLANKS or (byte in _LINE_ENDS and lex is Lex.PLACE)):
        return lex
    return Lex.SYNTAX


def _in_string(lex: Lex, byte: int) -> Lex:
    """The same inside of quotes: those of `short`, which lead to the states behind it."""
    quote, short = (ord("'"), Lex.SINGLE) if lex < Lex.DOUBLE else (ord('"'), Lex.DOUBLE)
    place, is_quote, is_escape = lex - short, byte == quote, byte == ord("\\")
    if place in (0, 2):  # in a short one; at its beginning a quote may be the second of three
        if is_quote:
            return Lex(short + 3) if place == 2 else Lex.SYNTAX
        if byte in _LINE_ENDS:
            return Lex.SYNTAX  # it was never closed
        return Lex(short + 1) if is_escape else short
    if place == 1:
        return short
    if place == 3:
        return Lex(short + 4) if is_quote else step(Lex.SYNTAX, byte)
    if place == 5:
        return Lex(short + 4)
    if is_quote:
        return Lex.SYNTAX if place == 7 else Lex(short + (7 if place == 6 else 6))
    return Lex(short + (5 if is_escape else 4))


def begins_number(text: bytes) -> bool:
    """Whether a token begins a number where one may begin: a digit, perhaps behind blanks, a sign and a point."""
    return _NUMBER.match(text) is not None
