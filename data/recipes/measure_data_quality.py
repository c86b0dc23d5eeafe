"""Measure on the tiny model what wrong and repeated training answers cost, three seeds each.

    python data/recipes/measure_data_quality.py           # about 3 minutes on two CPU cores
    python data/recipes/measure_data_quality.py 4         # a trial of 4 steps and one seed, printed and not kept

Writes data/data_quality.json: full fine-tuning on 1,080 instruction records of the generated world, as they are and with a fifth of
them spoilt, tested on the same 540. Every row sees as many examples. Which records are spoilt is the same for all seeds.
"""

import random
import sys

from course_lib import experiments, runtime, world
from course_lib.experiments import SEEDS, Method, compare, world_experiment

LEARNING_RATE = 5e-4  # of measure_effects.py
SHARE, DRAW = 0.2, 0


def main() -> None:
    records, machine, outcomes = world.read_world("train"), runtime.detect(), []
    kept = random.Random(DRAW).sample(records, len(records) - round(SHARE * len(records)))
    sets = {
        "as it is": records,
        "20 % left out": kept,
        "20 % replaced by copies": world.replace_by_copies(records, SHARE, DRAW),
        "20 % of the answers wrong": world.corrupt_answers(records, SHARE, DRAW),
    }
    trial = int(sys.argv[1]) if len(sys.argv) > 1 else None
    for name, train in sets.items():
        experiment = world_experiment(train) if trial is None else world_experiment(train, steps=trial)
        outcomes += compare([Method(name, LEARNING_RATE)], experiment, machine, seeds=SEEDS if trial is None else SEEDS[:1])
        print(experiments.summary(outcomes)[-1], flush=True)
    if trial is None:
        experiments.write_outcomes(outcomes, runtime.data_folder() / experiments.QUALITY_FILE)


if __name__ == "__main__":
    main()
