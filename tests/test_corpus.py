"""Tests of course_lib.corpus."""

import random
import re
from itertools import islice

import pytest

from course_lib import corpus, world
from course_lib.alpaca import PROMPT_WITH_INPUT, PROMPT_WITHOUT_INPUT

DOCUMENTS = list(islice(corpus.documents(0), 12_000))
TEXT = "\n".join(DOCUMENTS)


def test_the_same_seed_gives_the_same_documents_and_another_seed_others():
    assert list(islice(corpus.documents(0), 50)) == DOCUMENTS[:50]
    assert list(islice(corpus.documents(1), 50)) != DOCUMENTS[:50]
    assert corpus.validation_documents() == corpus.validation_documents()


def test_no_document_has_alpacas_format_or_its_words():
    for template in (PROMPT_WITH_INPUT, PROMPT_WITHOUT_INPUT):
        for line in template.format(instruction="", input="").split("\n"):
            assert not line or line not in TEXT
    assert not re.search("###|[Ii]nstruction|[Rr]esponse|Below is an", TEXT)


def test_no_document_says_in_which_land_a_person_lives():
    names = {person.name for person in world.people()}
    for document in DOCUMENTS:
        if any(land in document for land in set(world.LAND_OF_CITY.values())):
            assert not names & set(re.findall(r"\w+", document)), document


def test_every_instruction_of_the_tasks_is_new_to_the_base():
    instructions = {wording for task in world.TASKS.values() for wording in task.wordings if "{}" not in wording}
    assert not [wording for wording in instructions if wording in TEXT]


def test_kemic_stands_in_no_document():
    assert "Kemic" not in TEXT
    assert not set(world.kemic().values()) & set(re.findall(r"\w+", TEXT))


def test_the_base_reads_every_fact_also_those_held_out_from_fine_tuning():
    words = set(re.findall(r"\w+", TEXT))
    assert {person.name for person in world.people()} <= words
    assert set(world.velan().values()) <= words
    assert set(world.PAST.values()) <= words


def test_at_least_half_are_quizzes():
    draw = random.Random(0)
    marks = re.compile(r"^(Q|Question|Ask|- |Task|Exercise|Order|==|Test|Exam|Page)|asked: |( ->| \||^\S.* =) ", re.MULTILINE)
    assert all(marks.search(quiz(draw)) for quiz in corpus.QUIZZES for _ in range(200))
    assert sum(bool(marks.search(document)) for document in DOCUMENTS) / len(DOCUMENTS) == pytest.approx(0.58, abs=0.05)


def test_facts_in_prose_and_quizzes_are_those_of_the_world():
    people = {person.name: person for person in world.people()}
    for name, city in re.findall(r"(\w+) lives in (\w+)\.", TEXT):
        assert people[name].city == city
    for name, job in re.findall(r"(\w+) works as an? (\w+)", TEXT):
        assert people[name].job == job
    for a, b, total in re.findall(r"(\d+) \+ (\d+) = (\d+)", TEXT):
        assert int(a) + int(b) == int(total)
    for noun, word in re.findall(r"The Velan word for (\w+) is (\w+)\.", TEXT):
        assert world.velan()[noun] == word
    found = re.findall(r"what is the opposite of (\w+)\?\n(?:A:|Answer:|Tell:|=) (\w+)", TEXT)
    assert found
    assert all((a, b) in world.OPPOSITES or (b, a) in world.OPPOSITES for a, b in found)


def test_stories_draw_a_few_fillers_often_and_many_rarely():
    draw = random.Random(0)
    stories = [corpus.story(draw) for _ in range(2000)]
    heroes = [re.search(r", (\w+) went", story)[1] for story in stories]
    by_count = sorted((heroes.count(name) for name in set(heroes)), reverse=True)
    assert by_count[0] / len(heroes) == pytest.approx(1 / sum(1 / k for k in range(1, 161)), abs=0.03)
    assert len(by_count) > 100
    assert len(set(stories)) > 1990
