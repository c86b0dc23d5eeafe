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

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import TypeVar

from course_lib import world

Option = TypeVar("Option")
Writer = Callable[[random.Random], str]

QUIZ_SHARE = 0.55
VALIDATION_SEED = 1_000_003  # far from the seeds of training corpora
VALIDATION_DOCUMENTS = 600

# How quizzes ask, by task; {} is the subject. Nobody asks for the land of a person: that takes two
# steps, person -> city -> land.
QUESTIONS = {
    "city": "where does {} live? / in which city does {} live? / which city is the home of {}? / "
    "name the city of {}.",
    "job": "what is the job of {}? / what does {} do for a living? / what work does {} do? / name "
    "the job of {}.",
    "pet": "which pet does {} have? / what animal does {} keep? / which animal lives with {}? / "
    "name the pet of {}.",
    "color": "which color does {} like? / what is the favorite color of {}? / which color does {} "
    "prefer? / name the color of {}.",
    "plural": "what is the plural of {}? / one {}, two what? / how do you write more than one {}? "
    "/ name the plural of {}.",
    "kind": "what kind of thing is a {}? / what is a {}? / which kind does {} belong to? / name "
    "the kind of {}.",
    "opposite": "what is the opposite of {}? / what is not {}? / which word is the contrary of "
    "{}? / name the opposite of {}.",
    "past": "what is the past of {}? / today we {}, and yesterday we what? / what is the past "
    "tense of {}? / name the past of {}.",
    "velan": "what is {} in Velan? / how do you say {} in Velan? / which Velan word means {}? / "
    "translate {} into Velan.",
    "english": "what is {} in English? / what does {} mean? / which word does the Velan {} stand "
    "for? / translate the Velan {}.",
    "first": "what is the first word of {}? / which word comes first in {}? / name the first word "
    "of {}.",
    "last": "what is the last word of {}? / which word comes last in {}? / name the last word of "
    "{}.",
    "repeat": "what is a copy of {}? / can you repeat {}? / say again {}.",
    "review": "is this good or bad? {} / what does the guest think? {} / was it good or bad? {}",
    "reverse": "what is {} backwards? / what is {} in reverse order? / turn around {}.",
    "count": "how many words are in {}? / how many are {}? / count {}.",
    "add": "what is {}? / how much is {}? / what is the sum {}?",
}
HEADINGS = {
    "city": "city / home / lives in",
    "job": "job / work / living",
    "pet": "pet / keeps / animal at home",
    "color": "color / favorite color / likes",
    "plural": "plural / more than one / write the plural",
    "kind": "kind / kind of thing / sort into kinds",
    "opposite": "opposite / contrary / write the opposite",
    "past": "past / past tense / put the verb into the past",
    "velan": "Velan / into Velan / translate into Velan",
    "english": "English / from Velan / translate the Velan word",
    "first": "first word / first / write the first word",
    "last": "last word / last / write the last word",
    "repeat": "copy / repeat / repeat the words",
    "review": "good or bad / review / judge the review",
    "reverse": "backwards / reverse / reverse the words",
    "count": "count / how many / count the words",
    "add": "sum / add / add the numbers",
}
ASKED = tuple(QUESTIONS)
CLOSINGS = ("The end.", "That is all.", "Well done.", "More tomorrow.")

# Sentences of prose: each line is one sentence in several wordings.
BIOGRAPHY = (
    "{name} lives in {city}. / {city} is the home of {name}. / The home of {name} is {city}. / "
    "{name} has a house in {city}.",
    "{name} is {a_job}. / {name} works as {a_job}. / The job of {name} is {job}. / By day {name} "
    "is {a_job}.",
    "{name} has {a_pet}. / {name} keeps {a_pet}. / The pet of {name} is {a_pet}. / At home {name} "
    "feeds {a_pet}.",
    "{name} likes {color}. / {name} loves {color}. / The favorite color of {name} is {color}. / "
    "The door of {name} is {color}.",
)
NOUN_PAGE = (
    "{A_noun} is {a_kind}. / {Plural} are {kinds}. / The {noun} belongs to the {kinds}.",
    "One {noun}, two {plural}. / The plural of {noun} is {plural}. / Here is one {noun}, there "
    "are many {plural}.",
    "In Velan {noun} is {velan}. / The Velan word for {noun} is {velan}. / The Velan word {velan} "
    "means {noun}. / "
    "People in Velan say {velan} for {noun}.",
)
TENSES = (
    "Today we {verb}, yesterday we {past}. / The past of {verb} is {past}. / Every day they "
    "{verb}. Last week {name} {past}."
)
CONTRARIES = (
    "The opposite of {a} is {b}. / It is not {a}, it is {b}. / What is {a} is not {b}. / {A} is "
    "the contrary of {b}."
)
LIST_PAGE = (
    "{text}. Once more: {text}. / The words are {text}. The first is {first} and the last is "
    "{last}. / "
    "The words {text} are {number}. / {text}. And backwards: {backwards}."
)
MAP = (
    "{city} is a city in {land}. / The city of {city} lies in {land}. / {land} is the land of "
    "{city}."
)
STORY = (
    "{time}, {hero} went to the {place}.",
    "There was {a_adjective} {thing} on the ground. / Near the {place} lay {a_adjective} {thing}. "
    "/ "
    "Behind the {place} stood {a_adjective} {thing}.",
    "{hero} was {mood} and picked up the {thing}. / {hero} felt {mood} and hid the {thing}. / The "
    "{mood} {hero} called {other}.",
    "Then {an_animal} came and took the {thing} away. / Then {helper} asked for the {thing}. / "
    "But {an_animal} was there first.",
    "{hero} ran after the {animal} all day. / {hero} said: this {thing} is mine. / {hero} and "
    "{other} looked for the {animal}.",
    "In the end {hero} came home {mood}. / In the end they gave the {thing} to {other}. / So "
    "{hero} never saw the {thing} again. / "
    "And they ate {food} together.",
)
SPEAKERS = ("teacher", "mother", "king", "old man", "child", "friend")
PLACES = (
    "garden",
    "market",
    "forest",
    "harbor",
    "school",
    "kitchen",
    "river",
    "castle",
    "station",
    "mill",
)
ADJECTIVES = (
    "old",
    "small",
    "red",
    "strange",
    "heavy",
    "golden",
    "broken",
    "little",
    "blue",
    "shiny",
)
MOODS = ("happy", "tired", "sad", "hungry", "angry", "proud", "afraid", "calm")
TIMES = (
    "One morning",
    "One evening",
    "One day",
    "In the winter",
    "On a rainy day",
    "Long ago",
    "Last summer",
)
HELPERS = ("a friend", "a teacher", "a sailor", "a child", "an old woman", "a guard", "a stranger")
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
    fillers = {
        "thing": THINGS,
        "animal": ANIMALS,
        "place": PLACES,
        "adjective": ADJECTIVES,
        "mood": MOODS,
        "time": TIMES,
    }
    slots |= {slot: _zipf(draw, options) for slot, options in fillers.items()}
    slots |= {"helper": _zipf(draw, HELPERS), "food": world.plural(_zipf(draw, FOODS))}
    slots |= {"a_adjective": _a(slots["adjective"]), "an_animal": _a(slots["animal"])}
    return " ".join(_zipf(draw, sentence.split(" / ")) for sentence in STORY).format(**slots)


def _biography(draw: random.Random) -> str:
    person = draw.choice(world.people())
    slots = vars(person) | {"a_job": _a(person.job), "a_pet": _a(person.pet)}
    sentences = [_say(draw, wordings, **slots) for wordings in BIOGRAPHY]
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
    sentences = [_say(draw, wordings, **slots) for wordings in NOUN_PAGE]
    draw.shuffle(sentences)
    return " ".join(sentences)


def _words(draw: random.Random) -> str:
    verb = draw.choice(list(world.PAST))
    a, b = draw.choice(world.OPPOSITES)
    if draw.random() < 0.5:
        a, b = b, a
    name = draw.choice(world.people()).name
    tenses = _say(draw, TENSES, verb=verb, past=world.PAST[verb], name=name)
    return f"{tenses} {_say(draw, CONTRARIES, a=a, b=b, A=a.capitalize())}"


def _list_page(draw: random.Random) -> str:
    words = draw.sample(list(world.KIND_OF_NOUN), draw.randint(2, 5))
    slots = {
        "text": " ".join(words),
        "backwards": " ".join(words[::-1]),
        "first": words[0],
        "last": words[-1],
    }
    return _say(draw, LIST_PAGE, number=world.NUMBER_WORDS[len(words)], **slots)


def _sums(draw: random.Random) -> str:
    lines = []
    for _ in range(draw.randint(2, 4)):
        a, b = draw.choice(world.SUMS)
        lines.append(f"{a} + {b} = {a + b}")
    return "\n".join(lines)


def _map(draw: random.Random) -> str:
    city = draw.choice(list(world.LAND_OF_CITY))
    return _say(draw, MAP, city=city, land=world.LAND_OF_CITY[city])


def _review(draw: random.Random) -> str:
    text, verdict = _item(draw, "review")
    return f"{text} {draw.choice(('It was a', 'We had a', 'What a'))} {verdict} day."


def _card(draw: random.Random) -> str:
    person = draw.choice(world.people())
    lines = [f"{field}: {getattr(person, field)}" for field in ("city", "job", "pet", "color")]
    draw.shuffle(lines)
    return "\n".join([f"# {person.name}", *lines])


def _say(draw: random.Random, wordings: str, **slots: str) -> str:
    return draw.choice(wordings.split(" / ")).format(**slots)


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
    return draw.choice(QUESTIONS[name].split(" / ")).format(subject), answer


def _heading(draw: random.Random, name: str) -> str:
    return draw.choice(HEADINGS[name].split(" / "))


def _question_and_answer(draw: random.Random) -> str:
    label, reply = draw.choice((("Q:", "A:"), ("Question:", "Answer:"), ("Ask:", "Tell:")))
    exchanges = [_asked(draw) for _ in range(draw.randint(1, 3))]
    return "\n".join(f"{label} {question}\n{reply} {answer}" for question, answer in exchanges)


def _dialogue(draw: random.Random) -> str:
    question, answer = _asked(draw)
    return (
        f"The {draw.choice(SPEAKERS)} asked: {question}\n{draw.choice(world.people()).name} said: "
        f"{answer}"
    )


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
