"""Thousands of generated files: the readers of instruction data raise DataError and nothing else,
and lose no record in silence.

Which rows of a file are records is decided here once more, in other words. The files are the same
in every run (derandomize).
"""

import json
import re

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from course_lib import batching
from course_lib.alpaca import (
    FIELDS,
    MAX_FIELD_CHARACTERS,
    DataError,
    Record,
    read_records,
    read_seed_tasks,
)

STEADY = settings(derandomize=True, deadline=None, database=None)
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "\0",
    "\ud800",
    "\u2028",
    "\x85",
    "\ufeff",
    "{input}",
    "梨",
    "é",
    "\r\n",
]
NO_JSON = [
    "<!DOCTYPE html><html></html>",
    "version https://git-lfs.github.com/spec/v1\noid sha256:1",
    "",
    " \n\t",
    "\0\0\0",
    "NaN",
    "null",
]
NO_NUMBERS = ["NaN", "-Infinity", "1e999", "9" * 5000]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-32-be", "cp1252"]

UNSEEN = r"[\p{Cc}\p{Cf}\p{Z}\u115f\u1160\u2800\u3164\uffa0\ufe0e\ufe0f]"
PLAIN = ["Add.", "2", "Name a fruit.", "", " \n", "\u200b", "<NoInput>", "N/A", "None"]
texts = st.one_of(
    st.sampled_from(PLAIN),
    st.text(max_size=10),
    st.builds("{}{}".format, st.text(max_size=3), st.sampled_from(SPECIAL)),
)
long_texts = st.sampled_from([MAX_FIELD_CHARACTERS, MAX_FIELD_CHARACTERS + 1]).map(
    lambda length: "x" * length
)
records = st.fixed_dictionaries({"instruction": texts, "output": texts}, optional={"input": texts})
numbers = st.one_of(
    st.booleans(), st.integers(), st.just(10**400), st.floats(allow_nan=False, allow_infinity=False)
)
values = st.recursive(
    st.one_of(st.none(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=5,
)


@st.composite
def mistaken_records(draw):
    """A record with a field changed, renamed, added or left out."""
    row = draw(records)
    name = draw(st.sampled_from(FIELDS))
    match draw(st.sampled_from(["change", "rename", "add", "leave out"])):
        case "change":
            row[name] = draw(st.one_of(values, values, long_texts))
        case "rename":
            row[draw(texts)] = row.pop(name, "")
        case "add":
            row[draw(texts)] = draw(values)
        case "leave out":
            row.pop(name, None)
    return row


rows = st.lists(st.one_of(records, records, mistaken_records(), values), max_size=4)
sound_rows = rows.map(lambda rows: [{"instruction": "Name a fruit.", "output": "梨"}, *rows])
instances = st.lists(
    st.one_of(records, records, mistaken_records(), values), min_size=1, max_size=3
)
tasks = st.fixed_dictionaries(
    {"instruction": texts, "instances": instances}, optional={"id": texts}
)
mistaken_tasks = st.fixed_dictionaries(
    {"instruction": values, "instances": st.one_of(values, instances)}
)


@st.composite
def written(draw, rows):
    """(suffix, text): the rows as JSON or JSONL, now and then with a key twice, a NaN or too many
    brackets.
    """
    suffix = draw(st.sampled_from([".json", ".jsonl"]))
    ascii = draw(st.booleans())
    lines = [json.dumps(row, ensure_ascii=ascii) for row in rows]
    text = f"[{', '.join(lines)}]" if suffix == ".json" else "\n".join(lines)
    match draw(
        st.sampled_from([*["as it is"] * 6, "a key twice", "no number", "too many brackets"])
    ):
        case "a key twice":
            key = json.dumps(draw(texts))
            text = text.replace('{"', f'{{{key}: 1, {key}: 1, "', 1)
        case "no number":
            text = re.sub(
                r'(": )"[^"]*"', rf"\g<1>{draw(st.sampled_from(NO_NUMBERS))}", text, count=1
            )
        case "too many brackets":
            depth = draw(st.sampled_from([1, 3, 500, 100_000]))
            text = (
                draw(st.sampled_from(["[", '{"a": '])) * depth
                + text
                + draw(st.sampled_from(["]", "}", ""])) * depth
            )
    return suffix, text


@st.composite
def broken(draw, files):
    """(suffix, content): the text in some encoding, whole, or with a part cut off, changed, doubled
    or missing; or no JSON.
    """
    suffix, text = draw(
        st.one_of(
            *[files] * 9, st.tuples(st.sampled_from([".json", ".jsonl"]), st.sampled_from(NO_JSON))
        )
    )
    encoding = draw(st.sampled_from([*["utf-8"] * 20, *ENCODINGS]))
    content = text.encode(encoding, "replace" if encoding == "cp1252" else "surrogatepass")
    first, last = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    match draw(
        st.sampled_from([*["whole"] * 4, "cut off", "change", "double", "missing", "random"])
    ):
        case "cut off":
            content = content[:last]
        case "change":
            content = content[:first] + draw(st.binary(max_size=8)) + content[first + 1 :]
        case "double":
            content = content[:last] + content[first:]
        case "missing":
            content = content[:first] + content[last:]
        case "random":
            content = draw(st.binary(max_size=50))
    return suffix, content


def rows_in(path):
    """The rows of a file that was accepted: each line of JSONL, or each element of the list.

    No key twice, no NaN.
    """

    def once(pairs):
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    lines = (
        path.read_bytes().decode("utf-8-sig").split("\n")
        if path.suffix == ".jsonl"
        else [path.read_bytes().decode("utf-8-sig")]
    )
    found = [
        json.loads(line, object_pairs_hook=once, parse_constant=pytest.fail)
        for line in lines
        if line.strip()
    ]
    return found if path.suffix == ".jsonl" else found[0]


def good_records(rows):
    """The rows that are records, each once, in order: an input that is null, blank or a marker is
    none, other fields do not count.
    """
    found = []
    for row in rows:
        if isinstance(row, dict) and {"instruction", "output"} <= row.keys():
            given = row.get("input") if row.get("input") is not None else ""
            texts = [row["instruction"], row["output"], given]
            if all(
                isinstance(text, str) and re.fullmatch(r"[^\0\ud800-\udfff]{,100000}", text)
                for text in texts
            ):
                seen = [regex.sub(UNSEEN, "", text) for text in texts]
                if not seen[2] or seen[2].lower().strip("<>.") in ("none", "noinput", "n/a"):
                    texts[2] = ""
                record = Record(*texts)
                if seen[0] and seen[1] and record not in found:
                    found.append(record)
    return found


def check_accounting(reading, rows):
    assert reading.records == good_records(rows)
    assert (
        len(reading.records) + len(reading.refused)
        == len(rows)
        == len(reading.records) + sum(reading.reasons.values())
    )
    for line in (str(reading), *reading.refused):
        assert line.startswith(reading.source)
        check_line(line)


def check_line(line):
    assert line.splitlines() == [line]
    line.encode()  # a message with half a character could not be printed


def check_reader(read, path, content, rows_of):
    """The file is refused in one line that names it, or each of its rows is kept or refused."""
    path.write_bytes(content)
    refusal = None
    try:
        reading = read(path)
    except DataError as error:
        refusal = str(error)
    assert path.read_bytes() == content
    if refusal is None:
        check_accounting(reading, rows_of(path))
    else:
        assert path.name in refusal
        check_line(refusal)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("generated")


@pytest.mark.slow
@settings(STEADY, max_examples=3500)
@given(file=broken(rows.flatmap(written)))
def test_a_broken_file_is_refused_in_one_line_or_read_with_every_row_accounted_for(folder, file):
    suffix, content = file
    check_reader(read_records, folder / f"people{suffix}", content, rows_in)


@pytest.mark.slow
@settings(STEADY, max_examples=700)
@given(
    file=broken(
        st.lists(st.one_of(*[tasks] * 8, mistaken_tasks, values), max_size=4).flatmap(written)
    )
)
def test_a_broken_file_of_seed_tasks_is_refused_in_one_line_or_every_instance_accounted_for(
    folder, file
):
    def instances_in(path):
        pairs = [
            (task["instruction"], instance)
            for task in rows_in(path)
            for instance in task["instances"]
        ]
        return [
            {**row, "instruction": instruction} if isinstance(row, dict) else row
            for instruction, row in pairs
        ]

    suffix, content = file
    check_reader(read_seed_tasks, folder / f"tasks{suffix}", content, instances_in)


@settings(STEADY, max_examples=500)
@given(
    rows=sound_rows,
    suffix=st.sampled_from([".json", ".jsonl"]),
    ascii=st.booleans(),
    mark=st.booleans(),
)
def test_a_sound_file_is_never_refused_for_its_bad_rows(folder, rows, suffix, ascii, mark):
    half_characters = re.search(r"[\ud800-\udfff]", json.dumps(rows, ensure_ascii=False))
    lines = [json.dumps(row, ensure_ascii=ascii or bool(half_characters)) for row in rows]
    path = folder / f"sound{suffix}"
    path.write_text(
        "\n".join(lines) if suffix == ".jsonl" else f"[{', '.join(lines)}]",
        encoding="utf-8-sig" if mark else "utf-8",
    )
    check_accounting(read_records(path), rows)


@pytest.fixture(scope="module")
def tokenizer(machine):
    from course_lib import models

    return models.load("tiny", machine).tokenizer


@settings(STEADY, max_examples=300)
@given(rows=sound_rows)
def test_what_is_kept_survives_the_tokenizer(tokenizer, rows):
    for record in good_records(rows):
        if len(record.prompt + record.output) < 1000:
            example = batching.encode(record, tokenizer)
            assert tokenizer.decode(batching.encode_prompt(record, tokenizer)) == record.prompt
            assert tokenizer.decode(example.supervised_ids[:-1]) == record.output
            assert not set(tokenizer.all_special_ids) & set(example.input_ids[:-1])
