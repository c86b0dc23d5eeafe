"""Rows out of a JSON file, read strictly, with the place of whatever is wrong.

Python's json accepts NaN, repeated keys and lone surrogates without a word, and turns a wrong file
into a puzzling error later. What cannot be trusted as a whole raises DataError here, which says
what the file is and what to do, by what is in it and not by its name alone.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from course_lib.runtime import CourseError, first_line

JSON_LINES = (".jsonl", ".ndjson")
STARTS = {  # of files that are no text
    b"\x1f\x8b": "compressed with gzip",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"7z\xbc\xaf": "a 7z archive",
    b"PK\x03\x04": "a zip archive or an Excel workbook",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow stream",
    b"SQLite format 3": "an SQLite database",
    b"%PDF": "a PDF",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}


# encodings that are told apart from others by what they hold
TOLD_APART = frozenset(
    "gb18030 gb2312 gbk big5 big5hkscs cp932 shift_jis euc_jp euc_kr cp949 cp1251 koi8_r".split()
)


class DataError(CourseError):
    """A file of data that cannot be used; the message names file, place, what was found and what
    was expected.
    """


class _ContentError(ValueError):
    """What JSON allows or json accepts, and no record should hold."""


def read_rows(path: Path, expected: str) -> list[Any]:
    """The rows of a JSON list or, by the suffix, of JSON lines.

    expected: what the rows should be, for messages
    """
    text = _read_text(path, expected)
    try:
        if path.suffix.lower() in JSON_LINES:
            return _read_lines(path.name, text)
        rows = _decoder().decode(text)
    except DataError:
        raise
    except json.JSONDecodeError as error:
        raise DataError(_not_json(path.name, text, error)) from None
    except _ContentError as error:
        raise DataError(f"{path.name}, {_place(text)}: {error}") from None
    except RecursionError:
        raise DataError(f"{path.name}: lists nested too deeply, expected {expected}") from None
    except ValueError as error:
        raise DataError(f"{path.name}: {first_line(error)}") from None
    if isinstance(rows, dict):
        keys = ", ".join(json.dumps(key[:40]) for key in list(rows)[:5]) or "nothing"
        lists = [json.dumps(key[:40]) for key, value in rows.items() if isinstance(value, list)]
        columns = len(lists) == len(rows) > 1
        advice = f": save the list under {lists[0]} alone" if lists else ""
        found = f"an object with the keys {keys}"
        if columns:  # as pandas writes a table
            found, advice = f"columns ({keys})", ': save it with orient="records"'
        raise DataError(f"{path.name} holds {found}, expected {expected}{advice}")
    if not isinstance(rows, list):
        raise DataError(f"{path.name} holds {kind(rows)}, expected {expected}")
    return rows


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def _read_text(path: Path, expected: str) -> str:
    """The file as text: UTF-8, with or without a byte order mark."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"there is no file {path}: check the path") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} cannot be read: {first_line(error)}") from None
    name = path.name
    if not content.strip(b" \t\r\n\0"):
        raise DataError(f"{name} is empty, expected {expected}")
    if content.startswith(b"version https://git-lfs"):
        advice = "run `git lfs pull`, or download the file itself"
        raise DataError(f"{name} is a Git LFS pointer, not the data: {advice}")
    for start, what in STARTS.items():
        if content.startswith(start):
            raise DataError(f"{name} is {what}, expected JSON text: unpack or convert it first")
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content[:4]:
        raise DataError(f"{name} is UTF-16 or UTF-32, expected UTF-8: save it again as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        found = f"{name}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8"
        raise DataError(f"{found}{_encoding(content)}: save it again as UTF-8") from None
    if text.lstrip()[:1] == "<":
        advice = "download the raw file, not the page that shows it"
        raise DataError(f"{name} is a web page (HTML), expected JSON: {advice}")
    head = text.lstrip().partition("\n")[0]
    if head[:1] not in ("[", "{") and ("," in head or "\t" in head):
        advice = (
            'convert it, such as with pandas.read_csv(...).to_json("new.json", orient="records")'
        )
        raise DataError(f"{name} looks like a table (CSV), expected {expected}: {advice}")
    return text


def _encoding(content: bytes) -> str:
    """What the text may be instead of UTF-8; "" if it is too short to tell, or of the Latin code
    pages, of which the wrong one is often guessed.
    """
    from charset_normalizer import from_bytes

    if sum(byte > 127 for byte in content[:100_000]) < 40:
        return ""
    try:
        guess = from_bytes(content[:100_000]).best()
    except Exception:  # whatever its guesses run into
        return ""
    return f", perhaps {guess.encoding}" if guess and guess.encoding in TOLD_APART else ""


def _decoder() -> json.JSONDecoder:
    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                found = f"the key {json.dumps(key[:40])} stands twice in one record"
                raise _ContentError(f"{found}: keep one of them")
        return dict(pairs)

    def no_constants(name: str) -> None:
        raise _ContentError(f"{name} is not JSON, expected text in quotes")

    return json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=no_constants)


def _read_lines(name: str, text: str) -> list[Any]:
    """The values of JSON lines."""
    if text.lstrip()[:1] == "[" and isinstance(_value(text), list):
        raise DataError(f"{name} holds one JSON list, not a record a line: name the file .json")
    lines = enumerate(text.split("\n"), start=1)
    return [_line(f"{name}, line {number}", line) for number, line in lines if line.strip()]


def _line(place: str, line: str) -> Any:
    try:
        return _decoder().decode(line)
    except json.JSONDecodeError as error:
        if _ends_early(line, error):
            found = f"{place}: the line ends in the middle of a record"
            advice = "one whole record a line, or a list in a file named .json"
            raise DataError(f"{found}: expected {advice}") from None
        column = f"{place}, column {error.colno}"
        found = json.dumps(line[error.pos : error.pos + 20])
        raise DataError(f"{column}: not JSON ({error.msg}), found {found}") from None
    except _ContentError as error:
        raise DataError(f"{place}: {error}") from None


def _not_json(name: str, text: str, error: json.JSONDecodeError) -> str:
    place = f"{name}, line {error.lineno}"
    if _ends_early(text, error):
        return f"{place}: the file ends in the middle of a record, it was cut off: get it again"
    found = json.dumps(text[error.pos : error.pos + 20])
    hint = ""
    if error.msg == "Extra data":
        first = next(line for line in text.split("\n") if line.strip())
        hint = (
            "; one record a line is JSONL: name the file .jsonl"
            if isinstance(_value(first), dict)
            else "; there are several values: put them into one list, [..., ...]"
        )
    if text[: error.pos].rstrip().endswith(",") and text[error.pos] in "]}":
        hint = "; take away the comma before it"
    return f"{place}, column {error.colno}: not JSON ({error.msg}), found {found}{hint}"


def _ends_early(text: str, error: json.JSONDecodeError) -> bool:
    return not text[error.pos :].strip() or error.msg.startswith("Unterminated string")


def _value(text: str) -> Any:
    """What the text is as JSON, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _place(text: str) -> str:
    """The record of a JSON list at which reading stops for what it holds, and its line."""
    position, number, decoder = text.find("[") + 1, 0, _decoder()
    while True:
        while text[position : position + 1] in (" ", "\t", "\r", "\n", ","):
            position += 1
        number += 1
        try:
            _, position = decoder.raw_decode(text, position)
        except ValueError:
            return f"record {number}, from line {text.count(chr(10), 0, position) + 1} on"
