"""Draw data/composition.png: kinds, answer lengths and first words of data/instructions.json.

python data/recipes/draw_composition.py
"""

import json
import re
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from course_lib.plots import ACCENT, GOOD, INK

DATA = Path(__file__).parent.parent
FIRST_WORDS = 18


def main() -> None:
    records = json.loads((DATA / "instructions.json").read_text(encoding="utf-8"))
    english = [record for record in records if record["language"] == "English"]
    kinds = Counter(record["kind"] for record in records)
    english_kinds = Counter(record["kind"] for record in english)
    first = Counter(
        re.match(r"\W*(\w+)", record["instruction"]).group(1).lower() for record in english
    )
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 6.5), layout="constrained")

    names = [kind for kind, _ in kinds.most_common()]
    left.barh(names, [english_kinds[kind] for kind in names], color=GOOD, label="English")
    left.barh(
        names,
        [kinds[kind] - english_kinds[kind] for kind in names],
        left=[english_kinds[kind] for kind in names],
        color=ACCENT,
        label="Chinese",
    )
    left.invert_yaxis()
    left.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2)
    left.set_title(f"{len(records)} records of {len(kinds)} kinds", color=INK)

    lengths = [len(re.findall(r"\w+", record["output"])) for record in english]
    middle.hist(
        lengths, bins=[1, 2, 3, 5, 8, 12, 18, 27, 40, 60, 90, 135], color=GOOD, edgecolor="white"
    )
    middle.set_xscale("log")
    middle.set(
        xticks=[1, 3, 10, 30, 100],
        xticklabels=["1", "3", "10", "30", "100"],
        xlabel="words in the answer",
        ylabel="English records",
    )
    middle.minorticks_off()
    middle.set_title(f"Answers of {min(lengths)} to {max(lengths)} words", color=INK)

    words = first.most_common(FIRST_WORDS)
    share = sum(count for _, count in words) / len(english)
    right.barh([word for word, _ in words], [count for _, count in words], color=GOOD)
    right.invert_yaxis()
    right.set_title(
        f"{len(first)} different first words; these {FIRST_WORDS} open {share:.0%}", color=INK
    )
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DATA / "composition.png", dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    main()
