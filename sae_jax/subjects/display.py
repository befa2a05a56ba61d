"""The text of a single token, for people to read."""

from functools import cache

from tokenizers import Tokenizer


def display_token(tokenizer: Tokenizer, token: int) -> str:
    """The token as text; where its bytes are no whole characters, as `\\xe2\\x82`."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    byte_of = _map_alphabet_to_bytes()
    piece = tokenizer.id_to_token(token)
    if piece is None or not all(character in byte_of for character in piece):
        return text
    whole = bytes(byte_of[character] for character in piece)
    return whole.decode("utf-8", errors="backslashreplace")


@cache
def _map_alphabet_to_bytes() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves; the other bytes, in order,
    are the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }
