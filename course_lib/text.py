"""What a reader sees of a text: its words in any script, and whether it says anything at all."""

import unicodedata
from functools import cache
from typing import Any

# Scripts that put no space between words: each character is a word, with its marks.
UNSPACED = (
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}\u30fc\uff70]"
)
# Else letters and digits in a row with their marks; and a symbol, such as an emoji.
WORD = rf"{UNSPACED}\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--{UNSPACED}]+|\p{{So}}"
# what changes the meaning of the word it touches: -5, C++, $5
SIGNED = r"(?<!\w)[-\u2212]\p{N}+|\w+[\p{S}#]+|\p{Sc}\w+"
# a mark that ends a sentence, perhaps within quotes or brackets; Thai and its neighbours have none
ENDED = r"(?:[\p{STerm}:\uff1a\u2026;\u037e]|[\p{Thai}\p{Lao}\p{Khmer}]\p{M}*)[\p{P}\s]*$"
# letters and marks without a shape: blanks of Korean and of Braille, variation selectors
INVISIBLE_LETTERS = "\u115f\u1160\u2800\u3164\uffa0\ufe0e\ufe0f"
NOTHING = frozenset(
    "noinput|no input|no input provided|no input given|no input needed|no input required|n/a|none|"
    "null|not applicable|无|無|无输入|無輸入|没有输入|不适用".split("|")
)


def normalise(text: str) -> str:
    """Lower case, single spaces, one way to write each accent.

    >>> normalise("  New\\n Delhi ")
    'new delhi'
    """
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def words(text: str) -> list[str]:
    """The words of a text, lower case, without punctuation.

    >>> words("It's 5 o'clock; ете, 北京"), words("été") == words("ôté")
    (['it', 's', '5', 'o', 'clock', 'ете', '北', '京'], False)
    """
    return _pattern(WORD).findall(normalise(text))


@cache
def _pattern(expression: str) -> Any:
    import regex  # Python's re knows no scripts

    return regex.compile(expression, regex.V1)


def contains(text: str, part: str) -> bool:
    """Are the words of `part` in `text`, in a row?

    >>> contains("It is the Sun.", "sun"), contains("On Sunday.", "sun")
    (True, False)
    """
    wanted, found = words(part), words(text)
    if not wanted or not _signs(part) <= _signs(text):
        return False
    return any(found[i : i + len(wanted)] == wanted for i in range(len(found) - len(wanted) + 1))


def _signs(text: str) -> set[str]:
    return set(_pattern(SIGNED).findall(normalise(text)))


def ends_a_sentence(text: str) -> bool:
    """Does the text end as a sentence does, in its script?

    >>> ends_a_sentence("Add."), ends_a_sentence("बारिश पर लिखो।"), ends_a_sentence("Add the")
    (True, True, False)
    """
    return _pattern(ENDED).search(text) is not None


def is_blank(text: str) -> bool:
    """Is there nothing to see: spaces, controls, and characters without a shape?

    >>> is_blank(" \\u200b\\ufeff\\n"), is_blank(".")
    (True, False)
    """
    return all(
        unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Zs")
        or character in INVISIBLE_LETTERS
        for character in text
    )


def means_nothing(text: str) -> bool:
    """Is the text a marker for "nothing", in whatever brackets and case?

    >>> means_nothing("<NoInput>"), means_nothing("N/A."), means_nothing("None of these")
    (True, True, False)
    """
    visible = "".join(c for c in text if unicodedata.category(c) != "Cf")
    return normalise(visible.strip(" \t\r\n<>[](){}\"'`*.。-_")).replace("_", " ") in NOTHING
