"""Checks of what stands in data/, and of its datasheets."""

import importlib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import make_structured_answers as recipe
import pytest
import recording

from course_lib import adapter_files, evaluation, experiments, models, runtime, sealing, world
from tools import datasheets

DATA = Path(__file__).resolve().parents[1] / "data"
FILE = DATA / "structured_answers.json"
CANDIDATES = DATA / "recipes" / "retention_candidates.json"

FIELDS = ["instruction", "input", "output", "split", "topic", "entity", "phrasing"]
TOPICS = [
    "capital",
    "continent",
    "opposite",
    "plural",
    "past",
    "animal",
    "sum",
    "color",
    "calendar",
    "element",
]
# topics whose answers begin with a capital letter
PROPER = {"capital", "continent", "calendar", "element"}
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]

Record = dict[str, str]
RECORDS: list[Record] = json.loads(FILE.read_text(encoding="utf-8"))


def answer_of(record: Record) -> str:
    """Return the answer inside the record's output."""
    return json.loads(record["output"])["answer"]


def question_of(record: Record) -> str:
    """Return instruction and input as one string."""
    return f"{record['instruction']}\n{record['input']}".strip()


def of_topic(topic: str) -> list[Record]:
    """Return the records of one topic."""
    return [record for record in RECORDS if record["topic"] == topic]


def tokens(record: Record) -> tuple[str, ...]:
    """Return the words of the question, in lower case, with the entity (also "7 plus 5") replaced
    by X.
    """
    text, entity = question_of(record), record["entity"]
    for shape in (entity, entity.replace("+", "plus").replace("-", "minus")):
        text = re.sub(rf"(?<!\w){re.escape(shape)}(?!\w)", "X", text)
    return tuple(re.findall(r"[a-z0-9]+", text.lower()))


def rouge_l(a: tuple[str, ...], b: tuple[str, ...]) -> float:
    """The ROUGE-L F1 of two token sequences: 2 * longest common subsequence / total length."""
    row = [0] * (len(b) + 1)
    for token in a:
        previous = row
        row = [0]
        for index, other in enumerate(b):
            row.append(
                previous[index] + 1 if token == other else max(row[index], previous[index + 1])
            )
    return 2 * row[-1] / (len(a) + len(b))


def in_two_splits(key_of: Callable[[Record], object], records: list[Record]) -> list[object]:
    """Return the keys that occur in more than one split."""
    splits = defaultdict(set)
    for record in records:
        splits[key_of(record)].add(record["split"])
    return [key for key, found in splits.items() if len(found) > 1]


def test_the_file_is_exactly_what_the_recipe_writes():
    assert FILE.read_bytes() == recipe.render().encode("utf-8")


def test_every_line_holds_one_record():
    lines = FILE.read_text(encoding="utf-8").split("\n")
    assert (lines[0], lines[-2:]) == ("[", ["]", ""])
    assert [json.loads(line.strip().rstrip(",")) for line in lines[1:-2]] == RECORDS


def test_every_record_has_the_seven_text_fields_in_order():
    for record in RECORDS:
        assert list(record) == FIELDS, record
        assert all(isinstance(value, str) for value in record.values()), record
        assert all(record[field] for field in FIELDS if field != "input"), record


def test_every_output_is_plain_json_with_an_answer_and_the_topic():
    for record in RECORDS:
        output = json.loads(record["output"])
        assert list(output) == ["answer", "topic"], record
        assert output["topic"] == record["topic"], record
        assert record["output"] == json.dumps(output, ensure_ascii=False), record


def test_text_is_clean_and_composed_unicode():
    for record in RECORDS:
        for value in record.values():
            assert value == " ".join(value.split()), record
            assert value == unicodedata.normalize("NFC", value), record
            assert all(unicodedata.category(char)[0] != "C" for char in value), record


def test_splits_are_large_enough_and_topics_are_balanced():
    splits = Counter(record["split"] for record in RECORDS)
    topics = Counter(record["topic"] for record in RECORDS)
    assert list(topics) == TOPICS
    assert all(64 <= size <= 72 for size in topics.values()), topics
    for split, least in {"train": 420, "validation": 110, "test": 110}.items():
        assert splits[split] >= least, splits
        sizes = Counter(record["topic"] for record in RECORDS if record["split"] == split)
        assert set(sizes) == set(TOPICS), (split, sizes)
        assert max(sizes.values()) - min(sizes.values()) <= 8, (split, sizes)
    assert splits.total() == len(RECORDS) == splits["train"] + splits["validation"] + splits["test"]


def test_about_a_quarter_of_the_records_use_the_input_field():
    share = sum(bool(record["input"]) for record in RECORDS) / len(RECORDS)
    assert 0.2 <= share <= 0.33, share
    assert all(record["input"] in ("", record["entity"]) for record in RECORDS)


def test_every_topic_has_many_entities_and_phrasings():
    for topic in TOPICS:
        records = of_topic(topic)
        assert len({record["entity"] for record in records}) >= 30, topic
        assert len({record["phrasing"] for record in records}) >= 8, topic


def test_an_entity_has_one_answer_and_at_most_two_phrasings():
    answers, phrasings = defaultdict(set), defaultdict(list)
    for record in RECORDS:
        key = record["topic"], record["entity"]
        answers[key].add(answer_of(record))
        phrasings[key].append(record["phrasing"])
    assert not [key for key, found in answers.items() if len(found) > 1]
    assert not [
        key for key, used in phrasings.items() if len(used) > 2 or len(set(used)) < len(used)
    ]


def test_entities_and_phrasings_of_a_topic_stay_in_one_split():
    assert not in_two_splits(lambda record: (record["topic"], record["entity"]), RECORDS)
    assert not in_two_splits(lambda record: record["phrasing"], RECORDS)
    assert all(record["phrasing"].startswith(record["topic"] + "-") for record in RECORDS)


def test_a_sum_stays_in_one_split_whatever_its_order():
    assert not in_two_splits(
        lambda record: tuple(sorted(record["entity"].split())), of_topic("sum")
    )


def test_a_pair_of_opposites_stays_in_one_split_in_both_directions():
    assert not in_two_splits(
        lambda record: frozenset([record["entity"], answer_of(record)]), of_topic("opposite")
    )


def test_a_country_is_in_the_same_split_for_capital_and_continent():
    assert not in_two_splits(
        lambda record: record["entity"], of_topic("capital") + of_topic("continent")
    )


def test_no_question_occurs_twice():
    counts = Counter(question_of(record).lower() for record in RECORDS)
    assert not [question for question, count in counts.items() if count > 1]


def test_phrasings_of_different_splits_are_clearly_different():
    violations = []
    for topic in TOPICS:
        wordings = {(record["split"], tokens(record)) for record in of_topic(topic)}
        for (split, words), (other_split, other) in combinations(sorted(wordings), 2):
            if split != other_split and (score := rouge_l(words, other)) >= 0.8:
                violations.append(
                    f"{topic} {score:.2f}: {split} {' '.join(words)} | {other_split} "
                    f"{' '.join(other)}"
                )
    assert not violations, "\n".join(violations)


def test_the_topic_can_be_told_from_the_question():
    topics = defaultdict(set)
    for record in RECORDS:
        topics[question_of(record).lower()].add(record["topic"])
        if record["input"]:
            topics[record["instruction"].lower()].add(record["topic"])
    assert not [question for question, found in topics.items() if len(found) > 1]


def test_articles_fit_the_next_word():
    for record in RECORDS:
        question = question_of(record)
        assert not re.search(r"\ba [aeio]|\ban [^aeiou]", question, re.IGNORECASE), question


def test_arithmetic_is_right():
    for record in of_topic("sum"):
        left, sign, right = re.fullmatch(r"(\d+) ([+-]) (\d+)", record["entity"]).groups()
        assert int(answer_of(record)) == int(left) + int(sign + right), record
        assert 0 < int(answer_of(record)) <= 20, record


def test_calendar_answers_are_right():
    pattern = re.compile(r"the (day|month) (two (?:day|month)s )?(after|before) (\w+)")
    for record in of_topic("calendar"):
        unit, two, direction, start = pattern.fullmatch(record["entity"]).groups()
        names = DAYS if unit == "day" else MONTHS
        step = (2 if two else 1) * (1 if direction == "after" else -1)
        assert answer_of(record) == names[(names.index(start) + step) % len(names)], record


def test_answers_are_normalised():
    for record in RECORDS:
        answer, topic = answer_of(record), record["topic"]
        assert 1 <= len(answer.split()) <= 3, record
        assert not re.match(r"(?i)(a|an|the) ", answer), record
        pattern = (
            r"\d+"
            if topic == "sum"
            else r"[A-Z][A-Za-z]*( [A-Z][a-z]+)*"
            if topic in PROPER
            else r"[a-z]+"
        )
        assert re.fullmatch(pattern, answer), record


def test_retention_candidates_are_plain_questions_with_short_lower_case_answers():
    candidates = json.loads(CANDIDATES.read_text(encoding="utf-8"))
    assert len({candidate["question"].lower() for candidate in candidates}) == len(candidates)
    for candidate in candidates:
        assert list(candidate) == ["question", "answers", "field"], candidate
        assert re.fullmatch(r"[A-Z].*\?", candidate["question"]), candidate
        assert 1 <= len(set(candidate["answers"])) == len(candidate["answers"]), candidate
        for answer in candidate["answers"]:
            assert re.fullmatch(r"\S.*\S", answer), candidate
            assert answer == answer.lower(), candidate
            assert not re.search(
                rf"(?<!\w){re.escape(answer)}(?!\w)", candidate["question"].lower()
            ), candidate


def test_retention_candidates_do_not_repeat_the_course_questions():
    candidates = json.loads(CANDIDATES.read_text(encoding="utf-8"))
    words = (
        r"(?i)\b(capital|continent|opposite|antonym|plural|past tense|colou?r|"
        r"mammal|reptile|amphibian|symbol)s?\b"
    )
    assert not [candidate for candidate in candidates if re.search(words, candidate["question"])]
    questions = {question_of(record).lower() for record in RECORDS}
    assert not [candidate for candidate in candidates if candidate["question"].lower() in questions]


# --- instructions.json

INSTRUCTIONS: list[Record] = json.loads((DATA / "instructions.json").read_text(encoding="utf-8"))
INSTRUCTION_FIELDS = ["instruction", "input", "output", "kind", "language"]


def words_of(text: str) -> list[str]:
    """Return words in lower case, a Chinese character counting as one."""
    return re.findall(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+", text.lower())


def is_chinese(text: str) -> bool:
    """Return whether most letters of the text are Chinese characters."""
    letters = [letter for letter in text if letter.isalpha()]
    return sum("\u4e00" <= letter <= "\u9fff" for letter in letters) > len(letters) / 2


def test_every_instruction_record_has_five_text_fields_in_order():
    for record in INSTRUCTIONS:
        assert list(record) == INSTRUCTION_FIELDS, record
        assert all(isinstance(value, str) for value in record.values()), record
        assert all(record[field] for field in INSTRUCTION_FIELDS if field != "input"), record


def test_the_instructions_are_many_kinds_in_two_languages():
    kinds = Counter(record["kind"] for record in INSTRUCTIONS)
    assert len(INSTRUCTIONS) >= 500
    assert len(kinds) >= 25
    assert min(kinds.values()) >= 15, kinds
    languages = Counter(record["language"] for record in INSTRUCTIONS)
    assert languages.keys() == {"English", "Chinese"}
    assert languages["Chinese"] >= 60
    assert 0.35 <= sum(bool(record["input"]) for record in INSTRUCTIONS) / len(INSTRUCTIONS) <= 0.45


def test_answers_are_short_medium_and_long():
    lengths = sorted(len(words_of(record["output"])) for record in INSTRUCTIONS)
    assert (
        lengths[len(lengths) // 4]
        <= 12
        <= lengths[len(lengths) // 2]
        <= 60
        <= lengths[-len(lengths) // 10]
    )


def test_no_two_instructions_are_alike():
    rows = [words_of(question_of(record)) for record in INSTRUCTIONS]
    bags = [Counter(row) for row in rows]
    for one, other in combinations(range(len(rows)), 2):
        total = len(rows[one]) + len(rows[other])
        # no common subsequence is longer than this
        if 2 * sum((bags[one] & bags[other]).values()) / total >= 0.7:
            similarity = rouge_l(tuple(rows[one]), tuple(rows[other]))
            assert similarity < 0.7, (
                similarity,
                question_of(INSTRUCTIONS[one]),
                question_of(INSTRUCTIONS[other]),
            )


def test_instruction_text_is_clean_and_in_its_language():
    for record in INSTRUCTIONS:
        for field in INSTRUCTION_FIELDS:
            text = record[field]
            assert text == text.strip(), record
            assert unicodedata.is_normalized("NFC", text), record
            assert not [
                letter
                for letter in text
                if unicodedata.category(letter)[0] == "C" and letter != "\n"
            ], record
        assert (
            is_chinese(question_of(record))
            or record["language"] == "English"
            or record["kind"] in {"translate", "code"}
        ), record


def test_the_instructions_name_no_address_and_no_number_of_a_person():
    for record in INSTRUCTIONS:
        text = "\n".join(record.values())
        assert not re.search(r"https?://|www\.|[\w.]+@[\w.]+\.\w", text), record
        assert not re.search(
            r"(?<!\d)(?:\+\d{1,3}[ -])?\(?\d{3}\)?[ -]\d{3}[ -]\d{4}(?!\d)", text
        ), record


EQUATION = re.compile(
    r"(?<![\d.,/×x*+\-−] )(?<![\d.,/×*+\-−])(\d+(?:\.\d+)?) ([+×*/÷−-]) (\d+(?:\.\d+)?)"
    r" = (\d+(?:\.\d+)?)(%?)(?![\d.,/:])"
)
OPERATION = {
    "+": float.__add__,
    "×": float.__mul__,
    "*": float.__mul__,
    "/": float.__truediv__,
    "÷": float.__truediv__,
}


def test_simple_equations_in_the_answers_hold():
    checked = 0
    for record in INSTRUCTIONS:
        if record["kind"] in {"analyse", "correct"}:
            continue  # their texts hold mistakes on purpose
        for left, sign, right, result, percent in EQUATION.findall(record["output"]):
            value = OPERATION.get(sign, float.__sub__)(float(left), float(right)) * (
                100 if percent else 1
            )
            # the result may be rounded to the digits it shows
            tolerance = 0.5001 * 10 ** -len(result.partition(".")[2])
            assert abs(value - float(result)) <= tolerance, (left, sign, right, result, record)
            checked += 1
    assert checked >= 30


def test_python_in_the_answers_compiles():
    blocks = [
        block
        for record in INSTRUCTIONS
        for block in re.findall(r"```python\n(.*?)```", record["output"], re.DOTALL)
    ]
    assert len(blocks) >= 8
    for block in blocks:
        compile(block, "answer", "exec")


def test_dates_and_times_in_the_answers_exist():
    months = "|".join(MONTHS)
    for record in INSTRUCTIONS:
        for day in re.findall(rf"\b(\d{{1,2}}) (?:{months})\b", record["output"]) + re.findall(
            rf"\b(?:{months}) (\d{{1,2}})\b(?!:)", record["output"]
        ):
            assert 1 <= int(day) <= 31, record
        for hour, minute in re.findall(r"\b(\d{1,2}):(\d{2})\b(?!:)", record["output"]):
            assert int(minute) < 60, record
            assert int(hour) <= 60, record


# --- the Chinese prose, the retention questions, and the datasheet

PROSE = (DATA / "chinese_prose.txt").read_text(encoding="utf-8")
RETENTION: list[dict] = json.loads((DATA / "retention.json").read_text(encoding="utf-8"))


def test_the_chinese_prose_is_a_few_pages_of_plain_text():
    essays = PROSE.strip().split("\n\n")
    assert len(essays) >= 10
    assert sum("\u4e00" <= letter <= "\u9fff" for letter in PROSE) >= 6000
    assert not re.search(r"[A-Za-z]", PROSE)
    assert unicodedata.is_normalized("NFC", PROSE)


def test_retention_questions_are_selected_candidates_of_many_fields():
    candidates = {
        row["question"]: row for row in json.loads(CANDIDATES.read_text(encoding="utf-8"))
    }
    assert len(RETENTION) >= 100
    assert all(candidates[row["question"]] == row for row in RETENTION)
    assert len({row["question"] for row in RETENTION}) == len(RETENTION)
    assert len({row["field"] for row in RETENTION[:100]}) >= 10, (
        "any hundred in a row are a mixture"
    )


def test_the_datasheet_states_the_counts_of_the_files():
    sheet = (DATA / "README.md").read_text(encoding="utf-8")
    kinds = {record["kind"] for record in INSTRUCTIONS}
    with_input = sum(bool(record["input"]) for record in INSTRUCTIONS)
    chinese = sum(record["language"] == "Chinese" for record in INSTRUCTIONS)
    splits = Counter(record["split"] for record in RECORDS)
    words = [
        len(re.findall(r"\w+", record["output"]))
        for record in INSTRUCTIONS
        if record["language"] == "English"
    ]
    characters = sum("\u4e00" <= letter <= "\u9fff" for letter in PROSE)
    for statement in (
        f"{len(INSTRUCTIONS)} records, {len(INSTRUCTIONS) - chinese} English and {chinese} "
        f"Chinese, of {len(kinds)} kinds",
        f"{with_input} have an input",
        f"Answers are of {min(words)} to {max(words)} words",
        f"{len(RECORDS)} questions: {splits['train']} train, {splits['validation']} validation, "
        f"{splits['test']} test",
        f"{len(RETENTION)} questions of {len({row['field'] for row in RETENTION})} fields",
        f"{characters:,} Chinese characters",
    ):
        assert statement in sheet, statement


def test_the_tables_of_the_datasheets_are_those_of_the_measured_sweeps():
    for page in datasheets.pages():
        text = page.read_text(encoding="utf-8")
        assert datasheets.with_tables(text) == text, "run `make figures`"


def test_the_table_of_the_week_has_three_seeds_a_method_and_begins_untouched():
    untouched, prompted, *trained = experiments.read("week").by_label().values()
    assert (len(untouched), len(prompted), {len(runs) for runs in trained}) == (1, 3, {3})
    assert untouched[0].scores["valid JSON"] == 0
    assert (untouched[0].scores["retention"], untouched[0].scores["gained"]) == (100, 0), (
        "retention asks what the untouched model answers, gained what it does not"
    )
    assert not any("retention" in run.scores for run in prompted), "examples are of the task alone"


@pytest.mark.parametrize(
    "path", sorted((DATA / "measured").glob("*.json")), ids=lambda path: path.stem
)
def test_a_measured_sweep_names_the_recipe_that_measures_it(path):
    """The file is what the recipe would write, down to its name and first sentence."""
    sweep = experiments.read(path.stem)
    script, name = re.fullmatch(r"python data/recipes/(\w+)\.py (\w+)", sweep.recipe).groups()
    (recipe,) = (one for one in importlib.import_module(script).RECIPES if one.__name__ == name)
    assert path.stem in (name, f"{script.removeprefix('measure_')}_{name}")
    assert sweep.about == recording.about_of(recipe)
    assert all(outcome.scores.keys() <= sweep.measures.keys() for outcome in sweep.outcomes)


def test_the_worlds_adapter_answers_what_tiny_cannot(tiny):
    test = world.read_world("test")[::5]
    before = evaluation.score_answers(tiny, test)
    adapter_files.load_adapter(tiny.model, DATA / "adapters" / "world")
    after = evaluation.score_answers(tiny, test)
    assert before.exact_rate < 0.1 < 0.8 < after.exact_rate, (before, after)


def test_the_weeks_adapter_answers_in_the_form_of_the_task():
    base = models.load("smollm2-135m", runtime.detect())
    adapter_files.load_adapter(base.model, DATA / "adapters" / "week")
    assert evaluation.evaluate(base, evaluation.read_task("test")[::12]).rate("valid_json") >= 0.8


@pytest.mark.parametrize(("name", "most"), [("week", 1_000_000), ("world", 200_000)])
def test_an_adapter_of_the_week_is_sealed_small_and_named_after_its_public_base(name, most):
    folder = DATA / "adapters" / name
    sealing.check(folder)
    assert sum(file.stat().st_size for file in folder.iterdir()) < most
    base = json.loads((folder / adapter_files.CONFIG).read_text())["base_model_name_or_path"]
    assert base == {"week": "HuggingFaceTB/SmolLM2-135M-Instruct", "world": "tiny"}[name]
