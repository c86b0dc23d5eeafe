"""Measure the rows of the table of the week that exist so far, three seeds each.

    python data/recipes/measure_week.py                        # all, about 25 minutes on two CPU cores
    python data/recipes/measure_week.py "LoRA r=8, q and v"    # one row, the others are kept

Writes data/table_of_the_week.json: one outcome a run, with Day 1's recipe (32 steps of 4 questions of the train split), scored on
the whole test split and on all retention questions. Learning rates were chosen on the validation split: docs/decisions.md.
"""

import sys

from course_lib import experiments, runtime
from course_lib.experiments import Method, adapted, compare, last_blocks, week_experiment

METHODS = (
    Method("untouched", None),
    Method("full fine-tuning", 1e-4),
    Method("last 8 of 30 blocks in full", 6e-4, last_blocks(8)),
    Method("LoRA r=8, q and v", 5e-3, adapted(8, targets=["q_proj", "v_proj"])),
    Method("LoRA r=8, all linear layers", 2e-3, adapted(8)),
)


def main() -> None:
    known = [method.name for method in METHODS]
    chosen = sys.argv[1:] or known
    unknown = [name for name in chosen if name not in known]
    if unknown:
        sys.exit(f"row {unknown[0]!r} is not known, expected some of: {'; '.join(known)}")
    machine, target = runtime.detect(), runtime.data_folder() / experiments.WEEK_FILE
    for method in METHODS:
        if method.name in chosen:
            kept = experiments.read_outcomes(target) if target.exists() else []
            outcomes = [outcome for outcome in kept if outcome.method != method.name and outcome.method in known]
            outcomes += compare([method], week_experiment(), machine)
            experiments.write_outcomes(sorted(outcomes, key=lambda outcome: known.index(outcome.method)), target)
            print(experiments.summary([outcome for outcome in outcomes if outcome.method == method.name])[0], flush=True)


if __name__ == "__main__":
    main()
