"""What each token of a tokenizer adds to a text, as bytes. Loads neither torch nor transformers."""

import json

from tokenizers import Tokenizer


def token_table(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of every id; nothing for special tokens and unassigned ids.

    Raises:
        ValueError: the tokenizer's decoder gives its tokens no fixed bytes.
    """
    decoder = json.loads(tokenizer.to_str())["decoder"] or {"type": "none"}
    kinds = [part["type"] for part in decoder.get("decoders", [decoder])]
    spell = _byte_level if "ByteLevel" in kinds else str.encode
    ids = tokenizer.get_vocab(with_added_tokens=True)
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    table = [b""] * (max(ids.values()) + 1)
    for token, i in ids.items():
        if i not in special:
            table[i] = spell(token)
    # Decoders come in many chains: what counts is that this one puts the same bytes side by side, and that it keeps a
    # leading space.
    plain = sorted(set(ids.values()) - special, key=lambda i: (table[i][:1] != b" ", i))
    decoded: str = tokenizer.decode(plain, skip_special_tokens=False)
    if decoded != b"".join(table[i] for i in plain).decode(errors="replace"):
        raise ValueError(f"the tokenizer's decoder ({', '.join(kinds)}) gives its tokens no fixed bytes")
    return table


def _byte_of() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable bytes stand for themselves, the rest for U+0100 onwards in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of()


def _byte_level(token: str) -> bytes:
    known = [_BYTE_OF[char] for char in token if char in _BYTE_OF]
    # As the decoder does it: a token with a character outside the alphabet (an added one) is plain text.
    return bytes(known) if len(known) == len(token) else token.encode()
