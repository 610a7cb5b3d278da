"""Text encodings: byte order marks, code pages by name, and guesses of the code page of bytes."""

import codecs
import unicodedata
from typing import NamedTuple

AUTO = "auto"  # UTF-8, or the encoding of the byte order mark
EXAMPLES = "utf-8, cp1252, cp437, gbk, big5, cp932, cp949 or cp1251"
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
NO_TEXT = frozenset({"idna", "punycode", "undefined", "unicode-escape", "raw-unicode-escape", "utf-7"})
SHOWN = 3  # readings in a message


class CodePage(NamedTuple):
    """A code page. `common`: the first bytes of its frequent two-byte characters."""

    name: str
    common: range = range(0)


# The first is preferred among equal likelihoods. https://encoding.spec.whatwg.org/#legacy-multi-byte-encodings
CODE_PAGES = (
    CodePage("gbk", range(0xB0, 0xD8)),
    CodePage("cp932", range(0x88, 0x98)),
    CodePage("big5", range(0xA4, 0xC7)),
    CodePage("cp949", range(0xB0, 0xC9)),
    CodePage("cp1252"),
    CodePage("cp437"),
    CodePage("cp1251"),
    CodePage("cp866"),
)


def check_encoding(name: str) -> str:
    """Returns the name. Raises ValueError where Python has no text encoding of that name."""
    if name == AUTO:
        return name
    try:
        codec = codecs.lookup(name)
    except (LookupError, ValueError):
        codec = None
    if codec is None or not codec._is_text_encoding or codec.name.replace("_", "-") in NO_TEXT:
        raise ValueError(f"encoding {name[:40]!r} is not the name of a text encoding; take {AUTO}, {EXAMPLES}")
    return name


def marked_encoding(start: bytes) -> tuple[str, bytes] | None:
    """Returns the encoding of the byte order mark at the start, and the mark; None without a mark."""
    return next(((name, mark) for mark, name in MARKS if start.startswith(mark)), None)


def decode_text(data: bytes, encoding: str = AUTO) -> str:
    """Decodes text; a byte order mark overrides `encoding`. Raises UnicodeDecodeError."""
    name, mark = marked_encoding(data) or ("utf-8" if encoding == AUTO else encoding, b"")
    return data[len(mark) :].decode(name)


def readings(samples: list[bytes]) -> list[tuple[str, list[str]]]:
    """Returns the most likely code pages for all samples with the decoded texts, the most likely first."""
    found: list[tuple[float, str, list[str]]] = []
    for page in CODE_PAGES:
        try:
            texts = [sample.decode(page.name) for sample in samples]
        except UnicodeDecodeError:
            continue
        if all(char.isprintable() for text in texts for char in text):
            found.append((_likelihood("".join(texts), page), page.name, texts))
    found.sort(key=lambda each: -each[0])
    return [(name, texts) for _, name, texts in found[:SHOWN]]


def described(samples: list[bytes]) -> str:
    """Returns the readings for a message: `猫, 狗 as gbk; ├¿, ╣╖ as cp437`."""
    return "; ".join(f"{', '.join(texts)} as {name}" for name, texts in readings(samples)) or "no text in usual ones"


def _likelihood(text: str, page: CodePage) -> float:
    """Returns the mean likelihood, 0 to 1, of the characters beyond ASCII."""
    has_ascii = any(char.isascii() and char.isalpha() for char in text)
    worth = [_worth(char, page, has_ascii) for char in text if not char.isascii()]
    return sum(worth) / len(worth) if worth else 0.0


def _worth(char: str, page: CodePage, beside_ascii: bool) -> float:
    encoded, name = char.encode(page.name, "replace"), unicodedata.name(char, "")
    if not unicodedata.category(char).startswith("L"):
        return 0.1  # a frame or a sign
    if len(encoded) == 2:
        return 0.9 if encoded[0] in page.common or name.startswith(("HIRAGANA", "KATAKANA")) else 0.3
    if name.startswith("LATIN"):
        return 0.8 if beside_ascii else 0.4
    if name.startswith("HALFWIDTH"):
        return 0.2
    return 0.1 if beside_ascii else 0.7
