"""Write data/structured_answers.json, the "task of the week".

Every record is a short question whose answer is a small JSON object:

    What is the capital of France?   ->   {"answer": "Paris", "topic": "capital"}

There are ten topics ("sum" includes subtraction). Within a topic both the entities (France) and the
phrasings ("What is the capital of ...?") are divided over the splits, so a validation or test
question uses an entity and a wording that training never shows. Nothing is random: run the script
again and you get the same file, byte for byte.

The facts and the phrasings lie in structured_answers_facts.json. Left out on purpose is whatever
has two right answers, such as countries with two capitals or on two continents, nouns with two
plurals (scarf, mango), verbs with two past forms (learn, sink), words with several opposites (old,
right, short) and things with several usual colors (apple, rose).

    python data/recipes/make_structured_answers.py
"""

import calendar
import json
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "structured_answers.json"
SIZES = {"train": 44, "validation": 12, "test": 12}  # records per topic
FACTS = json.loads(Path(__file__).with_name("structured_answers_facts.json").read_text("utf-8"))
DAYS, MONTHS = list(calendar.day_name), list(calendar.month_name)[1:]

Facts = list[tuple[str, str]]  # (entity, answer)


def pairs(items: list[str]) -> Facts:
    """Read "entity=answer"."""
    return [(entity, answer) for entity, answer in (item.split("=") for item in items)]


def groups(items: list[str]) -> Facts:
    """Read "answer: entity, entity, ..."."""
    lines = [item.split(": ") for item in items]
    return [(entity, answer) for answer, entities in lines for entity in entities.split(", ")]


def sums(items: list[str]) -> Facts:
    """Read "7 + 5" or "9 - 4" and compute the answer."""
    facts = []
    for item in items:
        left, sign, right = item.split()
        facts.append((item, str(int(left) + int(right) * (1 if sign == "+" else -1))))
    return facts


def steps(items: list[str]) -> Facts:
    """Read "Monday+1" or "May-2", days or months later or earlier, and compute the answer."""
    facts = []
    for item in items:
        start, step = item[:-2], int(item[-2:])
        names, unit = (DAYS, "day") if start in DAYS else (MONTHS, "month")
        distance = "" if abs(step) == 1 else f"two {unit}s "
        entity = f"the {unit} {distance}{'after' if step > 0 else 'before'} {start}"
        facts.append((entity, names[(names.index(start) + step) % len(names)]))
    return facts


def facts_of(topic: str, split: str) -> Facts:
    read = {"pairs": pairs, "groups": groups, "sums": sums, "steps": steps}[FACTS[topic]["kind"]]
    return read(FACTS[topic][split]["facts"])


def question(phrasing: str, entity: str) -> tuple[str, str]:
    """Return the instruction and the input for an entity."""
    if "{" not in phrasing:
        return phrasing, entity
    article = "an" if entity[0] in "aeiou" else "a"
    words = entity.replace("+", "plus").replace("-", "minus")
    return phrasing.format(e=entity, a=f"{article} {entity}", w=words), ""


def records_of(topic: str) -> list[dict[str, str]]:
    """Return all records of a topic; when the entities run out, the first ones come again with
    another phrasing.
    """
    records, number = [], 0
    for split, size in SIZES.items():
        facts, phrasings = facts_of(topic, split), FACTS[topic][split]["phrasings"]
        assert size / 2 <= len(facts) <= size, (
            f"{topic}, {split}: {len(facts)} facts for {size} records"
        )
        for index in range(size):
            lap, place = divmod(index, len(facts))
            entity, answer = facts[place]
            chosen = (place + lap) % len(phrasings)
            instruction, text = question(phrasings[chosen], entity)
            output = json.dumps({"answer": answer, "topic": topic}, ensure_ascii=False)
            records.append(
                {
                    "instruction": instruction,
                    "input": text,
                    "output": output,
                    "split": split,
                    "topic": topic,
                    "entity": entity,
                    "phrasing": f"{topic}-{number + chosen + 1}",
                }
            )
        number += len(phrasings)
    return records


def check_facts() -> None:
    """Stop when an entity occurs twice in a topic, or the same fact, in another shape, in two
    splits.
    """
    seen: dict[str, str] = {}  # what must stay within one split -> the split
    for topic in FACTS:
        splits = {split: facts_of(topic, split) for split in SIZES}
        entities = [entity for facts in splits.values() for entity, _ in facts]
        assert len(entities) == len(set(entities)), f"{topic}: an entity occurs twice"
        for split, facts in splits.items():
            for entity, answer in facts:
                kind = "country" if topic in ("capital", "continent") else topic
                parts = {"opposite": {entity, answer}, "sum": set(entity.split())}.get(
                    topic, {entity}
                )
                key = f"{kind}: {sorted(parts)}"
                assert seen.setdefault(key, split) == split, f"{key} is in two splits"


def render() -> str:
    """Return the text of the data file: a JSON list with one record per line."""
    check_facts()
    lines = [
        json.dumps(record, ensure_ascii=False) for topic in FACTS for record in records_of(topic)
    ]
    return "[\n " + ",\n ".join(lines) + "\n]\n"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8", newline="\n")
    print(f"wrote {TARGET.name}")
