"""What the tiny model has read: prose and quizzes about the generated world, and nothing else.

Only its tokenizer has also seen the Alpaca prompts, so that they are not cut into letters.

Four findings shaped the corpus (data/tiny_llama/README.md):
- A model that has only completed prose knows the facts but cannot answer: more than half of the
  documents are quizzes, in many formats. None is Alpaca's, so that there is something left for
  fine-tuning to teach; the words of some questions are familiar.
- In a quiz something always follows an answer, if only a closing line: without it a fifth of the
  test answers were right before any fine-tuning.
- The slots of stories are drawn with skewed (Zipf) weights, so that decoding has something to
  decide.
- Lists and sums are drawn anew in every document; facts are the same each time, in changing words.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

from course_lib import world

Option = TypeVar("Option")
Writer = Callable[[random.Random], str]

QUIZ_SHARE = 0.55
VALIDATION_SEED = 1_000_003  # far from the seeds of training corpora
VALIDATION_DOCUMENTS = 600

# What is written, in all its wordings. In "questions", how quizzes ask, by task; {} is the subject.
# Nobody asks for the land of a person: that takes two steps, person -> city -> land.
WORDINGS = json.loads(Path(__file__).with_name("wordings.json").read_text("utf-8"))
ASKED = tuple(WORDINGS["questions"])
CLOSINGS = tuple(WORDINGS["closings"])
SAID, SLOTS = WORDINGS["prose"], WORDINGS["slots"]  # a list for each sentence; fillers
THINGS = tuple(noun for noun, kind in world.KIND_OF_NOUN.items() if kind in ("tool", "garment"))
ANIMALS, FOODS = (tuple(world.NOUNS_OF_KIND[kind].split()) for kind in ("animal", "food"))


def documents(seed: int) -> Iterator[str]:
    """Documents without end: the corpus of this seed.

    The facts in them do not depend on the seed.
    """
    draw = random.Random(seed)
    prose, weights = list(PROSE), list(PROSE.values())
    while True:
        if draw.random() < QUIZ_SHARE:
            yield f"{draw.choice(QUIZZES)(draw)}\n{draw.choice(CLOSINGS)}"
        else:
            yield draw.choices(prose, weights)[0](draw)


def validation_documents() -> list[str]:
    """Documents of a seed that no training corpus has.

    Facts are the same, so short ones recur; lists and stories do not.
    """
    stream = documents(VALIDATION_SEED)
    return [next(stream) for _ in range(VALIDATION_DOCUMENTS)]


# --- prose


def story(draw: random.Random) -> str:
    """Six sentences; each slot and each choice of words has a few frequent fillers and many rare
    ones.
    """
    slots = {"hero": _zipf(draw, world.people()).name, "other": _zipf(draw, world.people()).name}
    fillers = {"thing": THINGS, "animal": ANIMALS}
    fillers |= {slot: SLOTS[slot] for slot in ("place", "adjective", "mood", "time")}
    slots |= {slot: _zipf(draw, options) for slot, options in fillers.items()}
    slots |= {"helper": _zipf(draw, SLOTS["helper"]), "food": world.plural(_zipf(draw, FOODS))}
    slots |= {"a_adjective": _a(slots["adjective"]), "an_animal": _a(slots["animal"])}
    return " ".join(_zipf(draw, wordings) for wordings in SAID["story"]).format(**slots)


def _biography(draw: random.Random) -> str:
    person = draw.choice(world.people())
    slots = vars(person) | {"a_job": _a(person.job), "a_pet": _a(person.pet)}
    sentences = [_say(draw, wordings, **slots) for wordings in SAID["biography"]]
    draw.shuffle(sentences)
    return " ".join(sentences[: draw.randint(2, 4)])


def _noun_page(draw: random.Random) -> str:
    noun = draw.choice(list(world.KIND_OF_NOUN))
    kind, plural = world.KIND_OF_NOUN[noun], world.plural(noun)
    slots = {
        "noun": noun,
        "plural": plural,
        "velan": world.velan()[noun],
        "a_kind": _a(kind),
        "kinds": world.plural(kind),
    }
    slots |= {"A_noun": _a(noun).capitalize(), "Plural": plural.capitalize()}
    sentences = [_say(draw, wordings, **slots) for wordings in SAID["noun page"]]
    draw.shuffle(sentences)
    return " ".join(sentences)


def _words(draw: random.Random) -> str:
    verb = draw.choice(list(world.PAST))
    a, b = draw.choice(world.OPPOSITES)
    if draw.random() < 0.5:
        a, b = b, a
    name = draw.choice(world.people()).name
    tenses = _say(draw, SAID["tenses"], verb=verb, past=world.PAST[verb], name=name)
    return f"{tenses} {_say(draw, SAID['contraries'], a=a, b=b, A=a.capitalize())}"


def _list_page(draw: random.Random) -> str:
    words = draw.sample(list(world.KIND_OF_NOUN), draw.randint(2, 5))
    slots = {
        "text": " ".join(words),
        "backwards": " ".join(words[::-1]),
        "first": words[0],
        "last": words[-1],
    }
    return _say(draw, SAID["list page"], number=world.NUMBER_WORDS[len(words)], **slots)


def _sums(draw: random.Random) -> str:
    lines = []
    for _ in range(draw.randint(2, 4)):
        a, b = draw.choice(world.SUMS)
        lines.append(f"{a} + {b} = {a + b}")
    return "\n".join(lines)


def _map(draw: random.Random) -> str:
    city = draw.choice(list(world.LAND_OF_CITY))
    return _say(draw, SAID["map"], city=city, land=world.LAND_OF_CITY[city])


def _review(draw: random.Random) -> str:
    text, verdict = _item(draw, "review")
    return f"{text} {draw.choice(('It was a', 'We had a', 'What a'))} {verdict} day."


def _card(draw: random.Random) -> str:
    person = draw.choice(world.people())
    lines = [f"{field}: {getattr(person, field)}" for field in ("city", "job", "pet", "color")]
    draw.shuffle(lines)
    return "\n".join([f"# {person.name}", *lines])


def _say(draw: random.Random, wordings: list[str], **slots: str) -> str:
    return draw.choice(wordings).format(**slots)


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _zipf(draw: random.Random, options: Sequence[Option]) -> Option:
    """The k-th option with a probability proportional to 1 / k."""
    return options[draw.choices(range(len(options)), cum_weights=_harmonic(len(options)))[0]]


@cache
def _harmonic(n: int) -> tuple[float, ...]:
    return tuple(accumulate(1 / k for k in range(1, n + 1)))


PROSE: dict[Writer, int] = {
    _biography: 28,
    _noun_page: 16,
    _words: 14,
    _list_page: 12,
    story: 12,
    _sums: 6,
    _card: 6,
    _map: 3,
    _review: 3,
}


# --- quizzes


def _item(draw: random.Random, name: str) -> tuple[str, str]:
    """Subject and answer of one task, about any entity of the world: the base has met those held
    out from fine-tuning, too.
    """
    task = world.TASKS[name]
    return task.make(world.ENTITIES[task.entities], draw)


def _asked(draw: random.Random) -> tuple[str, str]:
    """A question in one sentence, and its answer."""
    name = draw.choice(ASKED)
    subject, answer = _item(draw, name)
    return draw.choice(WORDINGS["questions"][name]).format(subject), answer


def _heading(draw: random.Random, name: str) -> str:
    return draw.choice(WORDINGS["headings"][name])


def _question_and_answer(draw: random.Random) -> str:
    label, reply = draw.choice((("Q:", "A:"), ("Question:", "Answer:"), ("Ask:", "Tell:")))
    exchanges = [_asked(draw) for _ in range(draw.randint(1, 3))]
    return "\n".join(f"{label} {question}\n{reply} {answer}" for question, answer in exchanges)


def _dialogue(draw: random.Random) -> str:
    question, answer = _asked(draw)
    speaker, other = draw.choice(SLOTS["speaker"]), draw.choice(world.people()).name
    return f"The {speaker} asked: {question}\n{other} said: {answer}"


def _interview(draw: random.Random) -> str:
    return "\n".join(
        f"- {question}\n= {answer}"
        for question, answer in (_asked(draw) for _ in range(draw.randint(2, 3)))
    )


def _exercise(draw: random.Random) -> str:
    name = draw.choice(ASKED)
    subject, answer = _item(draw, name)
    task, text, solution = draw.choice(
        (("Task", "Text", "Solution"), ("Exercise", "Given", "Result"), ("Order", "On", "Done"))
    )
    return f"{task}: {_heading(draw, name)}\n{text}: {subject}\n{solution}: {answer}"


def _work_sheet(draw: random.Random) -> str:
    name = draw.choice(ASKED)
    subject, answer = _item(draw, name)
    return (
        f"== {_heading(draw, name)} ==\n{subject}\n== "
        f"{draw.choice(('solution', 'result', 'written'))} ==\n{answer}"
    )


def _exam(draw: random.Random) -> str:
    name = draw.choice(ASKED)
    lines = [f"{draw.choice(('Test', 'Exam', 'Page'))}: {_heading(draw, name)}"]
    for number in range(1, draw.randint(2, 4) + 1):
        subject, answer = _item(draw, name)
        lines.append(f"{number}. {subject}: {answer}")
    return "\n".join(lines)


def _table(draw: random.Random) -> str:
    name, arrow = draw.choice(ASKED), draw.choice(("->", "|", "="))
    lines = [_heading(draw, name)]
    for _ in range(draw.randint(2, 4)):
        subject, answer = _item(draw, name)
        lines.append(f"{subject} {arrow} {answer}")
    return "\n".join(lines)


QUIZZES: tuple[Writer, ...] = (
    _question_and_answer,
    _dialogue,
    _interview,
    _exercise,
    _work_sheet,
    _exam,
    _table,
)
