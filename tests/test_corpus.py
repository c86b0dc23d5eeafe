"""Tests of data/recipes/corpus.py."""

import random
import re
from collections import defaultdict
from itertools import islice

import corpus
import pytest

from course_lib import world
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


def test_no_instruction_of_the_tasks_stands_in_a_document_letter_for_letter():
    names = [person.name for person in world.people()]
    wordings = [wording for task in world.TASKS.values() for wording in task.wordings]
    instructions = {
        wording.format(name)
        for wording in wordings
        for name in (names if "{}" in wording else names[:1])
    }
    assert not [instruction for instruction in instructions if instruction in TEXT]


def test_kemic_stands_in_no_document():
    assert "Kemic" not in TEXT
    assert not set(world.kemic().values()) & set(re.findall(r"\w+", TEXT))


def test_the_base_reads_every_fact_also_those_held_out_from_fine_tuning():
    stands_in = defaultdict(set)
    for number, text in enumerate(DOCUMENTS):
        for word in set(re.findall(r"\w+", text)):
            stands_in[word].add(number)
    people = world.people()
    facts = [
        (person.name, fact)
        for person in people
        for fact in (person.city, person.job, person.pet, person.color)
    ]
    facts += [
        *world.velan().items(),
        *world.PAST.items(),
        *world.OPPOSITES,
        *world.LAND_OF_CITY.items(),
    ]
    assert not [fact for fact in facts if not stands_in[fact[0]] & stands_in[fact[1]]]


def test_more_than_half_are_quizzes_and_these_go_on_after_an_answer():
    assert sum(document.endswith(corpus.CLOSINGS) for document in DOCUMENTS) / len(
        DOCUMENTS
    ) == pytest.approx(corpus.QUIZ_SHARE, abs=0.02)


def test_facts_in_prose_and_quizzes_are_those_of_the_world():
    people = {person.name: person for person in world.people()}
    checks = {
        r"(\w+) lives in (\w+)\.": lambda name, city: people[name].city == city,
        r"(\w+) works as an? (\w+)": lambda name, job: people[name].job == job,
        r"(\d+ \+ \d+) = (\d+)": lambda terms, total: (
            sum(map(int, terms.split(" + "))) == int(total)
        ),
        r"The Velan word for (\w+) is (\w+)\.": lambda noun, word: world.velan()[noun] == word,
        r"what is the opposite of (\w+)\?\n(?:A:|Answer:|Tell:|=) (\w+)": lambda a, b: (
            {(a, b), (b, a)} & set(world.OPPOSITES)
        ),
    }
    for pattern, holds in checks.items():
        found = re.findall(pattern, TEXT)
        assert len(found) > 10, pattern
        assert all(holds(*pair) for pair in found), pattern


def test_stories_draw_a_few_fillers_often_and_many_rarely():
    draw = random.Random(0)
    stories = [corpus.story(draw) for _ in range(2000)]
    heroes = [re.search(r", (\w+) went", story)[1] for story in stories]
    by_count = sorted((heroes.count(name) for name in set(heroes)), reverse=True)
    assert by_count[0] / len(heroes) == pytest.approx(
        1 / sum(1 / k for k in range(1, 161)), abs=0.03
    )
    assert len(by_count) > 100
    assert len(set(stories)) > 1990
