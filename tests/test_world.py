"""Tests of course_lib.world."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from course_lib import world
from course_lib.alpaca import Record
from course_lib.runtime import CourseError

TRAIN, TEST = world.read_world("train"), world.read_world("test")
PEOPLE = {person.name: person for person in world.people()}


def of(records: list[Record], task: str) -> list[Record]:
    return [record for record in records if record.extra["task"] == task]


def subject(record: Record) -> str:
    return record.extra["subject"]


def words_about(record: Record) -> set[str]:
    """The entities that a record speaks of.

    Velan and English words of one noun count as one entity.
    """
    english = {velan: noun for noun, velan in world.velan().items()}
    nouns = {english.get(word, word) for word in record.input.rstrip(".").split()}
    return (
        nouns & world.KIND_OF_NOUN.keys()
        if record.extra["task"] not in ("opposite", "past", "add")
        else {record.input}
    )


def test_every_task_has_its_records_and_some_are_hard():
    assert 14 <= len(world.TASKS) <= 20
    assert 3 <= len(world.HARD) <= 4
    for name in world.TASKS:
        assert len(of(TRAIN, name)) == world.TRAIN_RECORDS
        assert len(of(TEST, name)) == world.TEST_RECORDS
    assert len(TEST) >= 500


@pytest.mark.parametrize("name", world.TASKS)
def test_a_task_has_no_subject_twice_and_none_in_both_splits(name):
    train, test = [[subject(record) for record in of(records, name)] for records in (TRAIN, TEST)]
    assert len(set(train)) == len(train)
    assert len(set(test)) == len(test)
    assert not set(train) & set(test)


def test_people_nouns_verbs_and_pairs_of_the_test_are_the_subject_of_no_training_record():
    people = [{subject(r) for r in records if subject(r) in PEOPLE} for records in (TRAIN, TEST)]
    words = [set().union(*(words_about(record) for record in records)) for records in (TRAIN, TEST)]
    assert people[0]
    assert words[0]
    assert not people[0] & people[1]
    assert not words[0] & words[1]
    pairs = dict(world.OPPOSITES) | {b: a for a, b in world.OPPOSITES}
    trained = {record.input for record in of(TRAIN, "opposite")}
    assert not {pairs[record.input] for record in of(TEST, "opposite")} & trained
    mirrored = {" + ".join(reversed(record.input.split(" + "))) for record in of(TEST, "add")}
    assert not mirrored & {record.input for record in of(TRAIN, "add")}


# The answer of every task, worked out here a second time from the subject alone.
OWN_ANSWER = {
    "city": lambda name: PEOPLE[name].city,
    "job": lambda name: PEOPLE[name].job,
    "pet": lambda name: PEOPLE[name].pet,
    "color": lambda name: PEOPLE[name].color,
    "land": lambda name: world.LAND_OF_CITY[PEOPLE[name].city],
    "plural": world.plural,
    "kind": lambda noun: next(
        kind for kind, nouns in world.NOUNS_OF_KIND.items() if noun in nouns.split()
    ),
    "opposite": lambda word: next(
        b if a == word else a for a, b in world.OPPOSITES if word in (a, b)
    ),
    "past": lambda verb: world.PAST[verb],
    "velan": lambda noun: world.velan()[noun],
    "english": lambda word: next(noun for noun, velan in world.velan().items() if velan == word),
    "first": lambda text: text.split()[0],
    "last": lambda text: text.split()[-1],
    "repeat": lambda text: text,
    "review": lambda text: "good" if any(f"was {word}" in text for word in world.GOOD) else "bad",
    "reverse": lambda text: " ".join(reversed(text.split())),
    "count": lambda text: ["zero", "one", "two", "three", "four", "five", "six", "seven"][
        len(text.split())
    ],
    "add": lambda text: str(sum(int(number) for number in text.split(" + "))),
}


@pytest.mark.parametrize("name", world.TASKS)
def test_every_answer_is_right(name):
    for record in of(TRAIN, name) + of(TEST, name):
        assert record.output == OWN_ANSWER[name](subject(record)), record


def test_the_subject_stands_in_the_prompt():
    for record in TRAIN + TEST:
        assert subject(record) in (record.input or record.instruction)


def test_facts_are_unambiguous():
    assert len(PEOPLE) == 160
    opposites = [word for pair in world.OPPOSITES for word in pair]
    assert len(set(opposites)) == len(opposites)
    assert (
        len(set(world.velan().values()))
        == len(set(world.kemic().values()))
        == len(world.KIND_OF_NOUN)
        == 120
    )
    invented = set(world.velan().values()) | set(world.kemic().values())
    english = (
        set(world.KIND_OF_NOUN)
        | set(opposites)
        | set(world.PAST)
        | set(world.PAST.values())
        | set(world.NUMBER_WORDS)
    )
    assert len(invented) == 240
    assert not invented & english
    assert set(world.PETS) <= set(world.NOUNS_OF_KIND["animal"].split())


def test_records_are_the_same_every_time_and_do_not_depend_on_other_tasks():
    code = (
        "from course_lib import world; print([r.prompt + r.output for r in "
        "world.read_world('test')] == eval(input()))"
    )
    expected = repr([record.prompt + record.output for record in TEST])
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        input=expected,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.stdout == "True\n", result.stderr
    assert sorted(world.read_world("test", ["past"]), key=str) == sorted(of(TEST, "past"), key=str)


def test_kemic_is_unknown_to_the_world_and_asks_each_noun_twice():
    records = world.read_kemic()
    assert len(records) == 240
    assert {(record.input, record.output) for record in records} == set(world.kemic().items())
    assert not any("Kemic" in record.prompt for record in TRAIN + TEST)


def test_an_unknown_split_or_task_is_refused():
    with pytest.raises(CourseError, match="split 'dev' is not known, expected train or test"):
        world.read_world("dev")
    with pytest.raises(CourseError, match="task 'sort' is not known, expected some of city, job"):
        world.read_world("test", ["sort"])


def test_corrupted_answers_are_wrong_in_the_right_form_and_counted():
    records = world.read_world("train")
    changed = world.corrupt_answers(records, 0.2, seed=1)
    wrong = [
        index
        for index, (one, other) in enumerate(zip(records, changed, strict=True))
        if one.output != other.output
    ]
    assert (
        len(wrong)
        == round(0.2 * len(records))
        == sum("wrong" in record.extra for record in changed)
    )
    answers = {
        name: {record.output for record in records if record.extra["task"] == name}
        for name in world.TASKS
    }
    for index in wrong:
        assert (changed[index].instruction, changed[index].input) == (
            records[index].instruction,
            records[index].input,
        )
        assert changed[index].output in answers[records[index].extra["task"]]
    assert records == world.read_world("train"), "the caller's records stay"
    assert (
        changed
        == world.corrupt_answers(records, 0.2, seed=1)
        != world.corrupt_answers(records, 0.2, seed=2)
    )
    assert world.corrupt_answers(records, 0.0, seed=1) == records
    with pytest.raises(CourseError, match="task 'plural' has one answer only"):
        world.corrupt_answers(world.read_world("train", ["plural"])[:1], 1.0, seed=0)


def test_copies_cost_variety_and_nothing_else():
    records = world.read_world("train")
    changed = world.replace_by_copies(records, 0.2, seed=1)
    assert len(changed) == len(records)
    assert all(record in records for record in changed)
    places = Counter(map(id, changed))
    assert len(places) == len(records) - round(0.2 * len(records))
    assert world.replace_by_copies(records, 0.0, seed=1) == records
    with pytest.raises(CourseError, match="leaves no record to copy"):
        world.replace_by_copies(records, 1.0, seed=0)
