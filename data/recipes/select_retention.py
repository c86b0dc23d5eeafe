"""Select data/retention.json: the candidate questions that the untouched SmolLM2-135M-Instruct
answers in its chat template.

    python data/recipes/select_retention.py        # about a minute on two CPU cores

A question stays if the first evaluation.REPLY_TOKENS tokens of the greedy reply contain one of its
answers as whole words. The replies were then read, and fifteen questions whose answer stood in a
wrong reply by accident were taken out of the candidates.
"""

import json
import random
from pathlib import Path

from course_lib import evaluation, models, runtime

CANDIDATES = Path(__file__).with_name("retention_candidates.json")
TARGET = Path(__file__).parent.parent / evaluation.RETENTION_FILE


def main() -> None:
    rows = json.loads(CANDIDATES.read_text(encoding="utf-8"))
    base = models.load("smollm2-135m", runtime.detect())
    if base.name != "smollm2-135m":
        raise SystemExit(f"the selection needs smollm2-135m, found {base.origin}")
    score = evaluation.evaluate_retention(base, evaluation.read_retention(CANDIDATES))
    chosen = [row for row, kept in zip(rows, score.kept, strict=True) if kept]
    random.Random(0).shuffle(chosen)  # so that the first hundred are a fair mixture of fields
    lines = ",\n".join(" " + json.dumps(row, ensure_ascii=False) for row in chosen)
    TARGET.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(
        f"{len(rows)} candidates = {len(chosen)} kept + {len(rows) - len(chosen)} not answered; "
        f"wrote {TARGET.name}"
    )
    for row, reply, kept in zip(rows, score.replies, score.kept, strict=True):
        print("kept " if kept else "     ", row["question"], "->", reply)


if __name__ == "__main__":
    main()
