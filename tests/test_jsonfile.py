"""Tests of course_lib.jsonfile: what a file is, and where it goes wrong; tests/faults has more."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import zipfile

import pytest

from course_lib.jsonfile import DataError, read_rows

ROW = {"instruction": "Add.", "output": "2"}
LINE = json.dumps(ROW)


def refusal(tmp_path, content, name="data.json"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        read_rows(path, "a list of records")
    message = str(error.value)
    assert message.count(name) == 1
    assert "\n" not in message
    return message


def zipped():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("data.json", "[]")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (gzip.compress(LINE.encode(), mtime=0), "compressed with gzip"),
        (bz2.compress(LINE.encode()), "compressed with bzip2"),
        (lzma.compress(LINE.encode()), "compressed with xz"),
        (zipped(), "a zip archive or an Excel workbook"),
        (pickle.dumps([ROW], protocol=4), "a pickle"),
        (b"\x28\xb5\x2f\xfd rest", "compressed with zstd"),
        (b"ARROW1\0\0 rest", "an Arrow file"),
        (b"SQLite format 3\0", "an SQLite database"),
    ],
)
def test_a_file_that_is_no_text_is_named_by_its_first_bytes(tmp_path, content, what):
    assert f"data.json is {what}, expected JSON text" in refusal(tmp_path, content)


@pytest.mark.parametrize(
    ("text", "encoding", "said"),
    [
        ("请列出三种水果。苹果、香蕉和梨。", "gbk", "perhaps gb18030"),
        ("請列出三種水果。蘋果、香蕉和梨。", "big5", "perhaps big5"),
        ("果物を三つ挙げてください。りんご", "shift_jis", "perhaps cp932"),
        ("Назови три фрукта. Яблоко и груша", "cp1251", "perhaps cp1251"),
        ("Nenne drei Früchte.", "utf-16-le", "UTF-16 or UTF-32"),
        ("Nenne drei Früchte.", "utf-32", "UTF-16 or UTF-32"),
    ],
)
def test_an_encoding_is_guessed_by_what_the_text_would_be(tmp_path, text, encoding, said):
    content = json.dumps([{"instruction": text, "output": text}], ensure_ascii=False)
    assert said in refusal(tmp_path, content.encode(encoding))


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("data.json", f"{LINE}\n{LINE}", "name the file .jsonl"),
        ("data.jsonl", f"[{LINE}]", "name the file .json"),
        ("data.jsonl", json.dumps([ROW], indent=1), "name the file .json"),
        ("data.json", json.dumps(ROW, indent=1) * 2, "put them into one list"),
        ("data.json", f"{LINE}{LINE}", "put them into one list"),
        ("data.jsonl", json.dumps(ROW, indent=1) * 2, "one whole record a line, or a list in a"),
        ("data.json", f'{{"data": [{LINE}]}}', 'save the list under "data" alone'),
    ],
)
def test_advice_leads_to_a_file_that_is_read(tmp_path, name, content, advice):
    assert advice in refusal(tmp_path, content, name)
    if advice.startswith("name the file "):
        other = tmp_path / f"data{advice.rpartition(' ')[2]}"
        other.write_text(content)
        assert ROW in read_rows(other, "a list of records")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('{"instruction": "Add.", "output": NaN}', "NaN is not JSON"),
        ('{"instruction": "Add.", "output": [1, -Infinity]}', "-Infinity is not JSON"),
        ('{"output": "2", "output": "3"}', 'the key "output" stands twice in one record'),
    ],
)
def test_the_place_of_what_python_would_let_pass_is_named(tmp_path, bad, said):
    message = refusal(tmp_path, f"[\n{LINE},\n{LINE},\n{bad}]")
    assert message.startswith(f"data.json, record 3, from line 4 on: {said}")
    message = refusal(tmp_path, f"{LINE}\n\n{bad}\n", "data.jsonl")
    assert message.startswith(f"data.jsonl, line 3: {said}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("instruction,input,output\nAdd,1,2\n", "looks like a table (CSV)"),
        ("instruction\toutput\nAdd\t2\n", "looks like a table (CSV)"),
        ('{"instruction": ["Add."], "output": ["2"]}', 'save it with orient="records"'),
        (f"[{LINE},]", "take away the comma before it"),
    ],
)
def test_what_other_programs_write_is_named_with_the_way_out(tmp_path, content, said):
    assert said in refusal(tmp_path, content)
