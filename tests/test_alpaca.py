"""Tests of course_lib.alpaca: the exact prompts, and what files hold; tests/faults has the files
that are broken.
"""

import json
from pathlib import Path

import pytest

from course_lib import alpaca
from course_lib.alpaca import DataError, Record, check_records, read_records
from course_lib.runtime import CourseError

GOOD = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
SEED_TASKS = Path(__file__).parents[2] / "shared" / "data" / "seed_tasks.jsonl"


def written(tmp_path, content, name="data.json"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_the_prompt_with_input_is_stanfords():
    assert Record("Add the numbers.", "3", input="1, 2").prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd the numbers.\n\n### Input:\n1, 2\n\n### Response:"
    )


def test_the_prompt_without_input_is_stanfords_and_ends_without_newline():
    assert Record("Name a prime.", "2").prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n"
        "### Instruction:\nName a prime.\n\n### Response:"
    )


def test_braces_in_a_record_stay_text():
    assert "{input} {0} {x!r}" in Record("{input} {0} {x!r}", "ok", input="{instruction}").prompt


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_lists_and_lines_give_the_same_records(tmp_path, name):
    rows = [GOOD, {"instruction": "Name a fruit.", "output": "梨"}]
    text = json.dumps(rows) if name == "data.json" else "\n".join(map(json.dumps, rows)) + "\n\n"
    reading = read_records(written(tmp_path, text, name))
    assert reading.records == [Record("Add.", "2", "1 + 1"), Record("Name a fruit.", "梨")]
    assert str(reading) == f"{name}: 2 read = 2 kept + 0 refused"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "holds no records"),
        (b"\0" * 1000, r"data\.json is empty"),
        (b'[{"instruction": "Add." "output": "2"}]', "line 1, column 25: not JSON"),
        (b'"text"', "holds text, expected a list"),
        (b"3", "holds a number, expected a list"),
        (
            b'{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": "d"}',
            "one record a line is JSONL",
        ),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "[Ee]xceeds the limit"),
        (b"\x1f\x8b\x08\x00 rest", "is compressed with gzip, expected JSON text: unpack"),
        (b"PAR1 rest", "is a Parquet file"),
        (b'[{"a\\nb": 1, "a\\nb": 2}]', r'the key "a\\nb" stands twice'),
        (b'[{"\\ud800": 1, "\\ud800": 2}]', r'the key "\\ud800" stands twice'),
    ],
)
def test_a_file_that_holds_something_else_is_named_in_one_line(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as error:
        read_records(written(tmp_path, content))
    assert "data.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_line_of_jsonl_is_named_by_its_number(tmp_path):
    with pytest.raises(DataError, match=r"data\.jsonl, line 3, column 2: not JSON"):
        read_records(written(tmp_path, f"{json.dumps(GOOD)}\n\n{{instruction}}\n", "data.jsonl"))


def test_a_record_over_several_lines_of_jsonl_is_explained(tmp_path):
    with pytest.raises(
        DataError,
        match=r"data\.jsonl, line 1: the line ends in the middle of a record: expected one whole",
    ):
        read_records(written(tmp_path, json.dumps(GOOD, indent=1), "data.jsonl"))
    with pytest.raises(DataError, match=r"line 1, column \d+: not JSON .Extra data., found [^;]*$"):
        read_records(written(tmp_path, json.dumps(GOOD) * 2, "data.jsonl"))


def test_a_missing_file_is_named_and_a_folder_too(tmp_path):
    with pytest.raises(DataError, match=r"there is no file .*nowhere\.json: check the path"):
        read_records(tmp_path / "nowhere.json")
    for path in (tmp_path, "a\0b"):
        with pytest.raises(DataError, match="cannot be read"):
            read_records(path)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, 'lacks a field: expected "instruction", found nothing'),
        ({**GOOD, "instruction": " \n"}, 'empty: "instruction" has no text'),
        ("Add.", "not an object: found text"),
        (None, "not an object: found null"),
    ],
)
def test_a_record_that_cannot_be_used_is_refused_and_counted(row, reason):
    reading = check_records([GOOD, row], "here")
    assert reading.records == [Record("Add.", "2", "1 + 1")]
    assert reading.refused == [f"here, record 2: {reason}"]
    assert (
        len(reading.records) + len(reading.refused)
        == 2
        == len(reading.records) + sum(reading.reasons.values())
    )


def test_further_fields_are_kept_only_when_asked_for():
    row = {**GOOD, "split": "test"}
    assert check_records([row], "here", extra=["split"]).records[0].extra == {"split": "test"}
    with pytest.raises(DataError, match='lacks a field: expected "split"'):
        check_records([GOOD], "here", extra=["split"])


def test_the_split_is_seeded_complete_and_disjoint():
    records = [Record(str(n), str(n)) for n in range(50)]
    train, test = alpaca.split_records(records, held_out=10, seed=3)
    assert (train, test) == alpaca.split_records(records, held_out=10, seed=3)
    assert test != alpaca.split_records(records, held_out=10, seed=4)[1]
    assert len(test) == 10
    assert sorted(record.output for record in train + test) == sorted(
        record.output for record in records
    )


@pytest.mark.parametrize("held_out", [0, 3, -1])
def test_a_split_that_leaves_nothing_is_refused(held_out):
    with pytest.raises(CourseError, match=r"must lie in 1\.\.2 for 3 records"):
        alpaca.split_records([Record("a", "b")] * 3, held_out, seed=0)


@pytest.mark.skipif(
    not SEED_TASKS.is_file(),
    reason="needs ../shared/data/seed_tasks.jsonl, real data that is not part of the project",
)
def test_the_real_seed_tasks_of_self_instruct_are_read_whole():
    reading = alpaca.read_seed_tasks(SEED_TASKS)
    instances = sum(
        len(json.loads(line)["instances"])
        for line in SEED_TASKS.read_text(encoding="utf-8").splitlines()
    )
    assert len(reading.records) + len(reading.refused) == instances
    assert len(reading.records) >= 0.95 * instances
    assert reading.records[0].instruction.startswith("Is there anything I can eat for a breakfast")


def test_seed_tasks_of_another_shape_are_named(tmp_path):
    for task in (GOOD, {"instruction": "a", "instances": []}, "text"):
        with pytest.raises(
            DataError,
            match='task 1: expected "instruction" and a list "instances" with at least one',
        ):
            alpaca.read_seed_tasks(written(tmp_path, json.dumps(task), "tasks.jsonl"))
    with pytest.raises(
        DataError, match="record 1: not an object: found text; no record can be used"
    ):
        alpaca.read_seed_tasks(
            written(tmp_path, json.dumps({"instruction": "a", "instances": ["b"]}), "tasks.jsonl")
        )


@pytest.fixture
def hub_data(fake_hub, tmp_path, monkeypatch):
    """The folder of a data set on the Hub, with nothing of it in the cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    fake_hub.folder = tmp_path / "repository"
    fake_hub.folder.mkdir()
    (fake_hub.folder / "README.md").write_text("# Data")
    return fake_hub.folder


def test_a_data_set_of_the_hub_goes_through_the_same_checks(hub_data):
    rows = [{**GOOD, "text": "made"}, {**GOOD, "output": "", "text": "made"}]
    (hub_data / "train.json").write_text(json.dumps(rows))
    assert str(alpaca.read_hub()) == (
        "tatsu-lab/alpaca: 2 read = 1 kept + 1 refused (1 empty); 1 x field 'text' left aside"
    )


@pytest.mark.parametrize("content", [None, "[{", "<html>"])
def test_a_repository_without_a_data_set_is_named_in_one_line(hub_data, content):
    if content is not None:
        (hub_data / "train.json").write_text(content)
    with pytest.raises(DataError, match="^owner/data holds no data set that can be read") as error:
        alpaca.read_hub("owner/data")
    assert "\n" not in str(error.value)


def test_without_the_hub_its_data_set_is_refused_at_once(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CourseError, match="HF_HUB_OFFLINE is set"):
        alpaca.read_hub()


def test_as_many_records_as_alpaca_has_are_checked_in_seconds(tmp_path):
    from course_lib.runtime import GB, measure

    rows = [
        {"instruction": f"Describe thing number {n}.", "input": "", "output": "word " * 50 + str(n)}
        for n in range(52_002)
    ]
    path = written(tmp_path, json.dumps(rows))
    with measure() as cost:
        reading = read_records(path)
    assert len(reading.records) == 52_002
    assert cost.seconds < 60
    assert cost.peak_bytes < GB + 10**9, "resident memory of the whole process, torch included"


EIGHT = [
    f"Name {number} rivers of Asia." for number in "one two three four five six seven eight".split()
]


def test_the_self_instruct_prompt_numbers_eight_demonstrations_and_asks_for_the_ninth():
    prompt = alpaca.self_instruct_prompt(EIGHT)
    assert [f"Task {number}: {text}" in prompt for number, text in enumerate(EIGHT, start=1)] == [
        True
    ] * 8
    assert prompt.endswith("\nTask 9:")
    assert alpaca.self_instruct_prompt(["Sort.\n  Then stop.", *EIGHT[1:]]).count(
        "\n"
    ) == prompt.count("\n")
    with pytest.raises(CourseError, match="7 demonstrations, expected 8"):
        alpaca.self_instruct_prompt(EIGHT[:7])


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (" Name a fruit.\nTask 10: Name a tool.", ["Name a fruit.", "Name a tool."]),
        (
            "Name a fruit.\n10. Name a tool.\n11) Name a sea.",
            ["Name a fruit.", "Name a tool.", "Name a sea."],
        ),
        ("Write 3. 14 is not a number here.", ["Write 3. 14 is not a number here."]),
        ("\n\nName a fruit.\nAn apple is one.\nTask 10:", ["Name a fruit."]),
        ("用一句话介绍长江。\nTASK 10 : Name a tool.", ["用一句话介绍长江。", "Name a tool."]),
        ("", []),
        (" \n", []),
    ],
)
def test_a_reply_is_split_at_its_numbers(reply, expected):
    assert alpaca.parse_instructions(reply) == expected


def test_what_self_instruct_drops_has_a_reason_and_nothing_is_lost():
    candidates = [
        "Name four rivers of Asia!",
        "Describe the smell of rain in one sentence.",
        "Describe the smell of rain in two sentences.",
        "Write a poem.",
        "Write a story about a dog that",
    ]
    selection = alpaca.novel(candidates, EIGHT)
    assert selection.kept == ["Describe the smell of rain in one sentence."]
    assert [text for text, _ in selection.dropped] == [candidates[index] for index in (0, 2, 3, 4)]
    reasons = [reason for _, reason in selection.dropped]
    assert reasons[0].startswith('ROUGE-L 1.00 with "Name')
    assert reasons[1:] == [
        # 6 of 8 words in common: 2 * 6 / (8 + 8)
        'ROUGE-L 0.75 with "Describe the smell of rain in one sentence."',
        "3 words, expected 4 to 150",
        "cut off: no mark at its end",
    ]
    assert alpaca.novel(candidates[1:3], [], threshold=0.76).dropped == []


def test_chinese_instructions_are_compared_by_character():
    selection = alpaca.novel(["用一句话介绍黄河。", "写一首关于雨的诗。"], ["用一句话介绍长江。"])
    assert selection.kept == ["写一首关于雨的诗。"]
    assert "ROUGE-L 0.75" in selection.dropped[0][1]


def test_on_english_the_scorer_is_the_librarys_own():
    from rouge_score.rouge_scorer import RougeScorer

    own = RougeScorer(["rougeL"])
    for one in EIGHT:
        for other in ("Name 3 rivers, please: two in Asia.", "It's RAINING in Rome", EIGHT[0]):
            assert alpaca.rouge_scorer().score(one, other) == own.score(one, other)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    alpaca.rouge_scorer.cache_clear()
    with pytest.raises(CourseError, match="rouge-score is missing: pip install rouge-score"):
        alpaca.novel(["Name a river in Africa."], [])


@pytest.mark.parametrize(
    "said", ["", " ", "\n", "\u200b", None, "<noinput>", "NoInput", "No input.", "N/A", "None"]
)
def test_an_input_that_says_nothing_is_none_and_counted(said):
    row = {"instruction": "Name a planet.", "output": "Mars", "input": said}
    reading = check_records([row], "here")
    assert reading.records == [Record("Name a planet.", "Mars")]
    assert sum(reading.notes.values()) == (1 if said else 0)
    assert ("read as none" in str(reading)) is bool(said)


def test_an_output_that_says_nothing_is_kept_and_counted_and_one_without_a_shape_refused():
    rows = [
        {"instruction": f"Question {n}", "output": said}
        for n, said in enumerate(("None", "\u2060", "N/A"))
    ]
    reading = check_records(rows, "here")
    assert [record.output for record in reading.records] == ["None", "N/A"]
    assert reading.refused == ['here, record 2: empty: "output" has no text']
    assert reading.notes == {"output 'None' kept": 1, "output 'N/A' kept": 1}


def test_records_that_differ_only_in_how_they_say_nothing_are_one():
    rows = [{**GOOD, "input": said} for said in ("", " ", "<noinput>")]
    assert str(check_records(rows, "here")).startswith(
        "here: 3 read = 1 kept + 2 refused (2 repeated)"
    )


def test_further_fields_are_left_aside_and_named(tmp_path):
    rows = [{**GOOD, "output": str(n), "model_response": ["x"], "id": n} for n in range(3)]
    del rows[2]["id"]
    reading = read_records(written(tmp_path, json.dumps(rows)))
    assert len(reading.records) == 3
    assert reading.notes == {"field 'model_response' left aside": 3, "field 'id' left aside": 2}
    assert "3 x field 'model_response' left aside, 2 x field 'id'" in str(reading)
    many = [{**GOOD, **{f"field{n}": 1 for n in range(20)}}]
    assert str(check_records(many, "here")).endswith(", and 12 more")


def test_a_missing_input_is_read_alike_by_every_reader(tmp_path, hub_data):
    rows = [{"instruction": "Name a planet.", "output": "Mars"}, {**GOOD, "input": "b a"}]
    lines = "\n".join(map(json.dumps, rows))
    (hub_data / "train.jsonl").write_text(lines)  # datasets makes null of the missing field
    ours = read_records(written(tmp_path, lines, "data.jsonl"))
    assert (
        alpaca.read_hub().records
        == ours.records
        == [
            Record("Name a planet.", "Mars"),
            Record("Add.", "2", "b a"),
        ]
    )


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}]}, "the user's turn as instruction"),
        ({"conversations": []}, "the human's turn as instruction"),
        ({"prompt": "Add.", "completion": "2"}, "call prompt instruction"),
        ({"question": "2 + 2?", "answer": "4"}, "call question instruction"),
        ({"instruction": "Add.", "response": "2"}, "call response output"),
    ],
)
def test_records_of_another_form_are_refused_with_the_way_out(row, advice):
    with pytest.raises(DataError, match=f"no record can be used: .*{advice}"):
        check_records([row], "data")
