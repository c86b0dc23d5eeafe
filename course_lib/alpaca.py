"""Alpaca data: instruction records, read strictly, and the two prompts they are put into.

Source: Stanford Alpaca (Taori et al. 2023), train.py. A record has an `instruction`, an `input`
(often empty) and an `output`; its prompt is one of two fixed texts, and the model is trained to go
on with the output. After `### Response:` there is no newline.

A record that cannot be used is refused and counted with its reason, so that always
read = kept + refused. An input that says nothing (blank, or a marker such as <noinput>) is read as
no input, fields that no prompt uses are left aside; both are counted. A file that cannot be trusted
as a whole raises DataError (`jsonfile`).

Self-Instruct (Wang et al. 2022, arXiv 2212.10560, section 2) lets a model write new instructions:
eight of them as demonstrations, a ninth asked for, and a candidate stays if its ROUGE-L with every
instruction kept so far is below 0.7. The wording of the prompt is ours; the paper's second half,
which lets the model write inputs and outputs too, is not here.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from course_lib import hub
from course_lib.jsonfile import DataError, kind, read_rows
from course_lib.runtime import CourseError, first_line
from course_lib.text import ends_a_sentence, is_blank, means_nothing, words

PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
FIELDS = ("instruction", "input", "output")
# far above any instruction; a record of megabytes is a broken export
MAX_FIELD_CHARACTERS = 100_000
MOST_NOTES = 8  # on one line
DEMONSTRATIONS = 8  # a Self-Instruct prompt shows six tasks written by people and two by a model
SHORTEST, LONGEST = 4, 150  # words of an instruction that the authors' code keeps
EXPECTED = 'a list of {"instruction": text, "input": text or "", "output": text}'


@dataclass(frozen=True)
class Record:
    """One instruction with its answer. extra: further fields that the reader was told to keep, such
    as "split".
    """

    instruction: str
    output: str
    input: str = ""
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The text the model sees before it answers.

        >>> Record("Name a prime.", "2").prompt.partition("### ")[2]
        'Instruction:\\nName a prime.\\n\\n### Response:'
        """
        template = PROMPT_WITH_INPUT if self.input else PROMPT_WITHOUT_INPUT
        return template.format(instruction=self.instruction, input=self.input)


@dataclass(frozen=True)
class Reading:
    """What a file held.

    refused: one line for each record that was not kept, with its number and reason
    notes: what was read as something else, left aside or remarkable in the kept ones -> how often
    """

    source: str
    records: list[Record]
    refused: list[str]
    reasons: Counter
    notes: Counter

    def __str__(self) -> str:
        """One line, for example: people.json: 3 read = 2 kept + 1 refused (1 repeated)."""
        kept, refused = len(self.records), len(self.refused)
        counts = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        notes = ", ".join(f"{n} x {what}" for what, n in self.notes.most_common(MOST_NOTES))
        notes += f", and {len(self.notes) - MOST_NOTES} more" * (len(self.notes) > MOST_NOTES)
        line = f"{self.source}: {kept + refused} read = {kept} kept + {refused} refused"
        return line + (f" ({counts})" if counts else "") + (f"; {notes}" if notes else "")


def read_records(path: Path | str, extra: Sequence[str] = ()) -> Reading:
    """Read Alpaca JSON (a list) or JSONL (a record a line, by the suffix .jsonl).

    extra: names of further text fields to allow and keep
    Raises DataError if the file as a whole cannot be used, or if no record in it can.
    """
    path = Path(path).expanduser()
    return check_records(read_rows(path, EXPECTED), path.name, extra)


def read_seed_tasks(path: Path | str) -> Reading:
    """Read Self-Instruct's seed_tasks.jsonl: each instance of a task becomes a record with the
    task's instruction.

    A task holds `instruction` and `instances`, a list of {"input", "output"}; id, name and
    is_classification are dropped.
    """
    path = Path(path).expanduser()
    rows = []
    for number, task in enumerate(read_rows(path, EXPECTED), start=1):
        instances = task.get("instances") if isinstance(task, dict) else None
        if not isinstance(instances, list) or not instances:
            raise DataError(
                f'{path.name}, task {number}: expected "instruction" and a list "instances" with '
                "at least one instance"
            )
        for instance in instances:
            rows.append(
                {**instance, "instruction": task.get("instruction")}
                if isinstance(instance, dict)
                else instance
            )
    return check_records(rows, path.name)


def read_hub(repository: str = "tatsu-lab/alpaca") -> Reading:
    """Read the split "train" of an Alpaca-style data set from the Hub, where it can be reached.

    The column `text`, the record already put into its prompt, is left aside: prompts are made here.
    Raises HubError at once where the Hub cannot be reached, DataError for what is no such data set.
    """
    hub.probe(f"datasets/{repository}", "README.md")
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    folder = hub.download(f"datasets/{repository}")
    try:
        rows = load_dataset(str(folder), split="train")
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(
            f"{repository} holds no data set that can be read: {first_line(error)}"
        ) from None
    return check_records(rows, repository)


def check_records(rows: Iterable[Any], source: str, extra: Sequence[str] = ()) -> Reading:
    """Keep the rows that are whole instruction records, refuse the others. source: what to call the
    data in messages.

    >>> whole = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
    >>> reading = check_records([whole, {"instruction": "Add."}], "sums")
    >>> print(reading)
    sums: 2 read = 1 kept + 1 refused (1 lacks a field)
    >>> reading.refused
    ['sums, record 2: lacks a field: expected "output", found "instruction"']
    """
    records, refused, seen = [], [], set()
    reasons, notes = Counter(), Counter()
    for number, row in enumerate(rows, start=1):
        problem = _problem(row, extra)
        if problem is None:
            said = row.get("input") or ""
            nothing = is_blank(said) or means_nothing(said)
            given = "" if nothing else said
            kept = {name: row[name] for name in extra}
            record = Record(row["instruction"], row["output"], given, kept)
            if (record.instruction, record.input, record.output) in seen:
                problem = ("repeated", "the same instruction, input and output came before")
        if problem is None:
            records.append(record)
            seen.add((record.instruction, record.input, record.output))
            aside = [str(name)[:40] for name in row if name not in (*FIELDS, *extra)]
            notes.update(f"field {name!r} left aside" for name in aside)
            if said and nothing:
                what = "blank input" if is_blank(said) else f"input {said.strip()!r}"
                notes[f"{what} read as none"] += 1
            if means_nothing(record.output):
                notes[f"output {record.output.strip()!r} kept"] += 1
        else:
            reason, details = problem
            reasons[reason] += 1
            refused.append(f"{source}, record {number}: {reason}: {details}")
    if not records:
        raise DataError(
            f"{refused[0]}; no record can be used{_converting(rows)}"
            if refused
            else f"{source} holds no records, expected {EXPECTED}"
        )
    return Reading(source, records, refused, reasons, notes)


def split_records(
    records: Sequence[Record], held_out: int, seed: int
) -> tuple[list[Record], list[Record]]:
    """Shuffle and split into (training, held out).

    The same seed gives the same split on every machine.

    >>> train, test = split_records([Record(str(n), str(n)) for n in range(5)], held_out=2, seed=0)
    >>> len(train), len(test)
    (3, 2)
    """
    if not 0 < held_out < len(records):
        raise CourseError(
            f"held_out={held_out} must lie in 1..{len(records) - 1} for {len(records)} records"
        )
    shuffled = random.Random(seed).sample(records, len(records))
    return shuffled[held_out:], shuffled[:held_out]


def self_instruct_prompt(demonstrations: Sequence[str]) -> str:
    """Eight numbered instructions and the number of the ninth, which the model shall write.

    The prompt ends in a colon, not in a space: tokenizers glue a space to the word that follows.

    >>> self_instruct_prompt([f"Name {n} rivers." for n in range(1, 9)]).splitlines()[-2:]
    ['Task 8: Name 8 rivers.', 'Task 9:']
    """
    if len(demonstrations) != DEMONSTRATIONS:
        raise CourseError(
            f"{len(demonstrations)} demonstrations, expected {DEMONSTRATIONS}: six by people, two "
            "by a model"
        )
    lines = [
        f"Task {number}: {' '.join(text.split())}"
        for number, text in enumerate(demonstrations, start=1)
    ]
    head = (
        "Below is a list of tasks for an assistant. Each is different from the others and can be "
        "done in writing.\n\n"
    )
    return head + "\n".join([*lines, f"Task {DEMONSTRATIONS + 1}:"])


def parse_instructions(reply: str) -> list[str]:
    """The instructions in what a model wrote after a Self-Instruct prompt: one a number, each the
    first line that follows it.

    >>> parse_instructions(" Name a fruit.\\nTask 10: Name a tool.\\n\\n11. Write a line on rain")
    ['Name a fruit.', 'Name a tool.', 'Write a line on rain']
    """
    parts = re.split(
        r"^[ \t]*(?:Task[ \t]+\d+[ \t]*[.:)]|\d+[.:)](?=\s))",
        reply,
        flags=re.MULTILINE | re.IGNORECASE,
    )
    firsts = [
        next((line.strip() for line in part.splitlines() if line.strip()), "") for part in parts
    ]
    return [line for line in firsts if line]


@dataclass(frozen=True)
class Selection:
    """What a filter did. dropped: (candidate, reason), so that  candidates = kept + dropped."""

    kept: list[str]
    dropped: list[tuple[str, str]]


def novel(candidates: Sequence[str], pool: Sequence[str], threshold: float = 0.7) -> Selection:
    """Keep the candidates whose ROUGE-L F1 with each instruction of `pool`, and with each kept
    before, is below `threshold`.

    Needs the package rouge-score. A candidate that is no whole sentence of 4 to 150 words is
    dropped before it is compared.

    >>> candidates = ["Name a river in Africa.", "Name a river in Asia.", "Write"]
    >>> selection = novel(candidates, ["Name three kinds of bread."])
    >>> selection.kept
    ['Name a river in Africa.']
    >>> dict(selection.dropped)["Name a river in Asia."]
    'ROUGE-L 0.80 with "Name a river in Africa."'
    >>> dict(selection.dropped)["Write"]
    '1 words, expected 4 to 150'
    """
    scorer, kept, dropped = rouge_scorer(), [], []
    for candidate in candidates:
        count = len(words(candidate))
        if not SHORTEST <= count <= LONGEST:
            dropped.append((candidate, f"{count} words, expected {SHORTEST} to {LONGEST}"))
        elif not ends_a_sentence(candidate):
            dropped.append((candidate, "cut off: no mark at its end"))
        else:
            scores = [
                (scorer.score(known, candidate)["rougeL"].fmeasure, known)
                for known in (*pool, *kept)
            ]
            highest, nearest = max(scores, default=(0.0, ""))
            if highest < threshold:
                kept.append(candidate)
            else:
                dropped.append((candidate, f'ROUGE-L {highest:.2f} with "{nearest}"'))
    return Selection(kept, dropped)


@cache
def rouge_scorer() -> Any:
    """rouge-score's scorer for "rougeL".

    Its own tokenizer drops all but a-z and 0-9; `text.words` knows all scripts.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise CourseError("the package rouge-score is missing: pip install rouge-score") from None

    class Words:
        tokenize = staticmethod(words)

    return RougeScorer(["rougeL"], tokenizer=Words())


def _converting(rows: Any) -> str:
    """How rows of a form that others use become records; "" for any other."""
    row = next(iter(rows), None)
    known = {
        "messages": "take the user's turn as instruction and the assistant's as output",
        "conversations": "take the human's turn as instruction and the model's as output",
        "prompt": "call prompt instruction, and completion or response output",
        "question": "call question instruction, and answer output",
        "response": "call response output, and context input",
    }
    advice = (advice for name, advice in known.items() if isinstance(row, dict) and name in row)
    return "".join(f": {one}" for one in [next(advice, "")] if one)


def _problem(row: Any, extra: Sequence[str]) -> tuple[str, str] | None:
    """Why a row cannot be used: (reason, details), or None. A missing input is an empty one."""
    if not isinstance(row, dict):
        return "not an object", f"found {kind(row)}"
    for name in (*FIELDS, *extra):
        value = row.get(name)
        if name == "input" and value is None:
            continue
        if name not in row:
            found = ", ".join(json.dumps(str(key)[:40]) for key in row) or "nothing"
            return "lacks a field", f'expected "{name}", found {found}'
        if not isinstance(value, str):
            return "not text", f'"{name}" is {kind(value)}'
        if is_blank(value) and name != "input":
            return "empty", f'"{name}" has no text'
        if len(value) > MAX_FIELD_CHARACTERS:
            found = f"{len(value):,} characters, at most {MAX_FIELD_CHARACTERS:,} are read"
            return "too long", f'"{name}" has {found}'
        if "\0" in value:
            return "NUL character", f'in "{name}"'
        if any("\ud800" <= character <= "\udfff" for character in value):
            return "broken character", f'half of a surrogate pair in "{name}"'
    return None
