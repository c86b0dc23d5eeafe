"""The generated world of the tiny model: its facts, and instruction tasks over them.

`tiny` has read nothing but text about this world (data/recipes/corpus.py), so all it can know is
written here: people who live in cities, work, keep a pet and like a colour; nouns with a kind and a
plural; verbs with a past; opposites; a small invented language, Velan.

The tasks ask about these facts as Alpaca records. Entities are held out: no person, noun, verb,
pair of opposites, list or sum that a test record asks about is asked about in training. The base
has read about all of them, but never in Alpaca's format, so what fine-tuning teaches is how to
answer, and the test asks whether that carries over to entities that fine-tuning has not touched.

Four tasks are HARD, named before anything was measured: they leave room in which methods can
differ.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from course_lib.alpaca import Record
from course_lib.runtime import CourseError

WORLD_SEED = 0  # of the facts; one world, whatever the seed of a corpus or a run
TRAIN_RECORDS, TEST_RECORDS = 60, 30  # per task

ONSETS = "Ba Da Fe Ga Jo Ka Li Ma Ne Pa Ro Sa Ti Vo Wi Ze".split()
ENDINGS = "bo den la mir na rik sa tor vi zan".split()
LAND_OF_CITY = {
    city: land
    for land, cities in {
        "Norrow": ("Arlen", "Bruvik", "Corvath"),
        "Sundel": ("Delmin", "Estin", "Farrow"),
        "Westria": ("Gelden", "Hollin", "Ispar"),
        "Eastmark": ("Jorun", "Keldor", "Lumeth"),
    }.items()
    for city in cities
}
JOBS = "baker teacher doctor farmer sailor painter singer tailor miner judge cook guard".split()
PETS = "cat dog horse goat rabbit duck owl frog fox hen".split()
COLORS = "red blue green yellow black white brown pink".split()
NOUNS_OF_KIND = {
    "animal": "fox wolf cat dog horse cow goat mouse bird duck goose bear lion frog snake bee owl "
    "hen pig rabbit",
    "food": "apple pear plum cherry grape lemon peach melon bean carrot potato tomato onion egg "
    "cake pie loaf bun cookie nut",
    "tool": "hammer saw knife axe spoon fork needle rope ladder brush shovel rake key lock nail "
    "wheel drill bucket broom net",
    "garment": "hat coat shirt scarf glove sock shoe boot belt dress skirt cap vest cloak apron "
    "sweater jacket sandal blouse tie",
    "vehicle": "car bus train ship boat truck bike plane sled canoe ferry wagon tram van cart "
    "raft taxi tractor rocket scooter",
    "plant": "rose tulip oak fern bush lily cactus daisy pine palm willow maple birch poppy "
    "clover thistle vine hedge reed orchid",
}
KIND_OF_NOUN = {noun: kind for kind, nouns in NOUNS_OF_KIND.items() for noun in nouns.split()}
IRREGULAR_PLURALS = {
    "wolf": "wolves",
    "mouse": "mice",
    "goose": "geese",
    "knife": "knives",
    "loaf": "loaves",
    "scarf": "scarves",
}
OPPOSITES = [
    tuple(pair.split("-"))
    for pair in (
        "big-small hot-cold tall-short fast-slow old-new happy-sad rich-poor clean-dirty hard-soft "
        "wet-dry light-dark full-empty "
        "high-low loud-quiet strong-weak early-late near-far deep-shallow wide-narrow thick-thin "
        "sharp-blunt sweet-bitter "
        "smooth-rough brave-timid kind-cruel cheap-costly simple-complex safe-dangerous "
        "fresh-stale alive-dead asleep-awake "
        "true-false right-wrong day-night up-down inside-outside above-below always-never "
        "north-south east-west front-back "
        "top-bottom friend-enemy summer-winter war-peace"
    ).split()
]
PAST = dict(
    pair.split("-")
    for pair in (
        "run-ran eat-ate go-went see-saw take-took give-gave write-wrote sing-sang drink-drank "
        "swim-swam begin-began break-broke "
        "choose-chose drive-drove fall-fell fly-flew forget-forgot grow-grew hold-held keep-kept "
        "know-knew leave-left "
        "lose-lost make-made meet-met pay-paid ride-rode rise-rose say-said sell-sold send-sent "
        "sit-sat sleep-slept speak-spoke "
        "spend-spent stand-stood steal-stole sweep-swept teach-taught tell-told think-thought "
        "throw-threw wake-woke "
        "wear-wore win-won walk-walked talk-talked jump-jumped play-played look-looked help-helped "
        "ask-asked call-called "
        "wash-washed bake-baked paint-painted climb-climbed open-opened close-closed laugh-laughed "
        "smile-smiled dance-danced "
        "push-pushed pull-pulled wait-waited watch-watched listen-listened visit-visited "
        "answer-answered carry-carried "
        "study-studied try-tried stop-stopped plan-planned hurry-hurried cry-cried clap-clapped "
        "hop-hopped save-saved move-moved "
        "love-loved use-used hope-hoped like-liked change-changed dream-dreamed learn-learned "
        "shout-shouted follow-followed "
        "finish-finished"
    ).split()
)
GOOD = "lovely tasty friendly warm bright cheerful perfect pretty gentle wonderful".split()
BAD = "awful broken rude ugly boring horrible nasty filthy smelly useless".split()
NUMBER_WORDS = "zero one two three four five six seven".split()


@dataclass(frozen=True)
class Person:
    """Somebody of the world, and the four facts about them."""

    name: str
    city: str
    job: str
    pet: str
    color: str

    @property
    def land(self) -> str:
        """Never written next to the name: it follows from the city."""
        return LAND_OF_CITY[self.city]


def plural(noun: str) -> str:
    """The plural of a noun of the world.

    >>> [plural(noun) for noun in ("cat", "fox", "cherry", "wolf", "potato")]
    ['cats', 'foxes', 'cherries', 'wolves', 'potatoes']
    """
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "sh", "ch", "ato")) else "s")


@cache
def people() -> tuple[Person, ...]:
    """All 160 people; each fact of each was drawn independently."""
    draw = random.Random(WORLD_SEED)
    names = [onset + ending for onset in ONSETS for ending in ENDINGS]
    draw.shuffle(names)
    cities = list(LAND_OF_CITY)
    return tuple(
        Person(name, draw.choice(cities), draw.choice(JOBS), draw.choice(PETS), draw.choice(COLORS))
        for name in names
    )


@cache
def velan() -> dict[str, str]:
    """The Velan word for every noun; all different, and related to nothing."""
    return _invented_words(
        "v z k l".split(), "a e i o u".split(), "m rr th nk sk".split(), WORLD_SEED
    )


@cache
def kemic() -> dict[str, str]:
    """A second invented language, of which the tiny model has read nothing: new knowledge, for the
    limits of low rank.
    """
    return _invented_words(
        "p b d g".split(), "a e i o u".split(), "f l st nd p".split(), WORLD_SEED + 1
    )


def _invented_words(
    first: list[str], vowels: list[str], second: list[str], seed: int
) -> dict[str, str]:
    words = [a + b + c + d for a in first for b in vowels for c in second for d in vowels]
    return dict(
        zip(KIND_OF_NOUN, random.Random(seed).sample(words, len(KIND_OF_NOUN)), strict=True)
    )


@dataclass(frozen=True)
class Task:
    """One instruction task. wordings: instructions, one of which a record takes; {} stands for the
    subject, if there is no input.

    make: (entities, generator) -> (subject, answer), one item about entities of one split.
    """

    name: str
    wordings: tuple[str, ...]
    make: Callable[[Sequence, random.Random], tuple[str, str]]
    entities: str  # a key of ENTITIES: what the subjects are drawn from, and what is held out
    hard: bool = False

    def record(self, subject: str, answer: str, draw: random.Random) -> Record:
        wording, extra = draw.choice(self.wordings), {"task": self.name, "subject": subject}
        if "{}" in wording:
            return Record(wording.format(subject), answer, extra=extra)
        return Record(wording, answer, subject, extra=extra)


def _fact(field: str) -> Callable[[Sequence[Person], random.Random], tuple[str, str]]:
    def make(entities: Sequence[Person], draw: random.Random) -> tuple[str, str]:
        person = draw.choice(entities)
        return person.name, getattr(person, field)

    return make


def _lookup(
    answer: Callable[[str], str],
) -> Callable[[Sequence[str], random.Random], tuple[str, str]]:
    def make(entities: Sequence[str], draw: random.Random) -> tuple[str, str]:
        word = draw.choice(entities)
        return word, answer(word)

    return make


def _listed(
    answer: Callable[[list[str]], str], shortest: int, longest: int
) -> Callable[[Sequence[str], random.Random], tuple[str, str]]:
    def make(entities: Sequence[str], draw: random.Random) -> tuple[str, str]:
        words = draw.sample(entities, draw.randint(shortest, longest))
        return " ".join(words), answer(words)

    return make


def _velan_word(entities: Sequence[str], draw: random.Random) -> tuple[str, str]:
    noun = draw.choice(entities)
    return velan()[noun], noun


def _opposite(entities: Sequence[tuple[str, str]], draw: random.Random) -> tuple[str, str]:
    pair = draw.choice(entities)
    return pair if draw.random() < 0.5 else pair[::-1]


def _review(entities: Sequence[str], draw: random.Random) -> tuple[str, str]:
    words, verdict = draw.choice([(GOOD, "good"), (BAD, "bad")])
    first, second = draw.sample(entities, 2)
    return (
        f"The {first} was {draw.choice(words)} and the {second} was {draw.choice(words)}.",
        verdict,
    )


def _sum(entities: Sequence[tuple[int, int]], draw: random.Random) -> tuple[str, str]:
    a, b = draw.choice(entities)
    return f"{a} + {b}", str(a + b)


TASKS = {
    task.name: task
    for task in (
        Task(
            "city",
            ("Where does {} live?", "Name the city where {} lives."),
            _fact("city"),
            "people",
        ),
        Task(
            "job",
            ("What is the job of {}?", "Tell me what {} does for a living."),
            _fact("job"),
            "people",
        ),
        Task(
            "pet",
            ("Which pet does {} have?", "Name the animal that {} keeps."),
            _fact("pet"),
            "people",
        ),
        Task(
            "color",
            ("Which color does {} like best?", "Name the favorite color of {}."),
            _fact("color"),
            "people",
        ),
        Task(
            "plural",
            ("Write the plural of the word.", "Put the noun into the plural."),
            _lookup(plural),
            "nouns",
        ),
        Task(
            "kind",
            ("What kind of thing is this?", "Sort the thing into its kind."),
            _lookup(KIND_OF_NOUN.__getitem__),
            "nouns",
        ),
        Task(
            "opposite",
            ("Write the opposite of the word.", "Name the contrary."),
            _opposite,
            "opposites",
        ),
        Task(
            "past",
            ("Put the verb into the past.", "Write the past tense of the verb."),
            _lookup(PAST.__getitem__),
            "verbs",
        ),
        Task(
            "velan",
            ("Translate the word into Velan.", "Say it in Velan."),
            _lookup(lambda noun: velan()[noun]),
            "nouns",
        ),
        Task(
            "english",
            ("Translate the Velan word.", "Say the Velan word in English."),
            _velan_word,
            "nouns",
        ),
        Task(
            "first",
            ("Write only the first word.", "Which word comes first?"),
            _listed(lambda words: words[0], 3, 5),
            "nouns",
        ),
        Task(
            "last",
            ("Write only the last word.", "Which word comes last?"),
            _listed(lambda words: words[-1], 3, 5),
            "nouns",
        ),
        Task("repeat", ("Repeat the words.", "Copy the text."), _listed(" ".join, 2, 4), "nouns"),
        Task("review", ("Is the review good or bad?", "Judge the review."), _review, "nouns"),
        Task(
            "reverse",
            ("Write the words backwards.", "Reverse the order."),
            _listed(lambda words: " ".join(words[::-1]), 3, 4),
            "nouns",
            hard=True,
        ),
        Task(
            "count",
            ("How many words are there?", "Count the words."),
            _listed(lambda words: NUMBER_WORDS[len(words)], 2, 7),
            "nouns",
            hard=True,
        ),
        Task("add", ("Add the numbers.", "Work out the sum."), _sum, "sums", hard=True),
        Task(
            "land",
            ("In which land does {} live?", "Name the land of {}."),
            _fact("land"),
            "people",
            hard=True,
        ),
    )
}
HARD = tuple(name for name, task in TASKS.items() if task.hard)


# all of them stand in the corpus, too: `add` may be answered by memory as well as by arithmetic
SUMS = tuple((a, b) for a in range(1, 50) for b in range(1, 50))
ENTITIES = {
    "people": people(),
    "nouns": tuple(KIND_OF_NOUN),
    "opposites": tuple(OPPOSITES),
    "verbs": tuple(PAST),
    "sums": SUMS,
}
HELD_OUT = {"people": 40, "nouns": 40, "opposites": 15, "verbs": 30, "sums": 800}


@cache
def _entities(kind: str, split: str) -> tuple:
    """The entities that the records of a split may speak of."""
    shuffled = random.Random(WORLD_SEED).sample(ENTITIES[kind], len(ENTITIES[kind]))
    return tuple(shuffled[: HELD_OUT[kind]] if split == "test" else shuffled[HELD_OUT[kind] :])


def read_world(split: str, tasks: Sequence[str] = tuple(TASKS)) -> list[Record]:
    """The records of "train" (60 a task) or "test" (30 a task), each on another subject; `extra`
    names task and subject.

    >>> record = read_world("test", ["plural"])[0]
    >>> print(record.instruction, record.input, "->", record.output)
    Write the plural of the word. cactus -> cactuses
    """
    counts = {"train": TRAIN_RECORDS, "test": TEST_RECORDS}
    if split not in counts:
        raise CourseError(f"split {split!r} is not known, expected train or test")
    if unknown := [name for name in tasks if name not in TASKS]:
        raise CourseError(f"task {unknown[0]!r} is not known, expected some of {', '.join(TASKS)}")
    records = []
    for name in tasks:
        task = TASKS[name]
        # a task's records do not depend on which others are asked for
        draw = random.Random(f"{WORLD_SEED} {split} {name}")
        made: dict[str, Record] = {}
        while len(made) < counts[split]:
            subject, answer = task.make(_entities(task.entities, split), draw)
            if subject not in made:
                made[subject] = task.record(subject, answer, draw)
        records += made.values()
    random.Random(f"{WORLD_SEED} {split}").shuffle(records)
    return records


def read_kemic() -> list[Record]:
    """Every noun with its Kemic word, in two wordings: nothing of it can be known before training,
    and nothing is held out.
    """
    wordings = ("Translate the word into Kemic.", "Say it in Kemic.")
    return [
        Record(wording, word, noun, extra={"task": "kemic", "subject": noun})
        for noun, word in kemic().items()
        for wording in wordings
    ]


def corrupt_answers(records: Sequence[Record], share: float, seed: int) -> list[Record]:
    """A copy of `records` in which this share of the answers is wrong: each is the answer of
    another record of its task.

    So the form of every answer stays right. `extra["wrong"]` marks the records that were changed.

    >>> words = ("fox", "cat")
    >>> records = [Record("Plural.", plural(word), word, {"task": "plural"}) for word in words]
    >>> [record.output for record in corrupt_answers(records, 0.5, seed=0)]
    ['foxes', 'foxes']
    """
    draw, changed = random.Random(seed), list(records)
    for index in draw.sample(range(len(records)), round(share * len(records))):
        record = records[index]
        others = [
            other.output
            for other in records
            if other.extra["task"] == record.extra["task"] and other.output != record.output
        ]
        if not others:
            raise CourseError(
                f"task {record.extra['task']!r} has one answer only here: give more of its records"
            )
        changed[index] = replace(
            record, output=draw.choice(others), extra=record.extra | {"wrong": "yes"}
        )
    return changed


def replace_by_copies(records: Sequence[Record], share: float, seed: int) -> list[Record]:
    """As many records as before, of which this share is now a copy of one of the others: fewer
    different ones.

    >>> records = read_world("train", ["plural"])
    >>> copies = replace_by_copies(records, 0.2, seed=0)
    >>> len(copies), len({record.input for record in copies})
    (60, 48)
    """
    draw, changed = random.Random(seed), list(records)
    lost = draw.sample(range(len(records)), round(share * len(records)))
    kept = sorted(set(range(len(records))) - set(lost))
    if lost and not kept:
        raise CourseError(f"share={share} leaves no record to copy, expected less than 1")
    for index in lost:
        changed[index] = records[draw.choice(kept)]
    return changed
