"""Measure the rows of the table of the week that exist so far, three seeds each.

    python data/recipes/measure_week.py        # about 20 minutes on two CPU cores

Writes data/table_of_the_week.json: one outcome a run, with Day 1's recipe (32 steps of 4 questions of the train split), scored on
the whole test split and on all retention questions. LoRA is peft's; its learning rate is not tuned yet.
"""

from course_lib import experiments, runtime
from course_lib.experiments import Method, compare, lora, week_experiment

METHODS = (
    Method("untouched", None),
    Method("full fine-tuning", 1e-4),
    Method("LoRA r=8, all linear layers", 1e-3, lora(8)),
)


def main() -> None:
    machine, outcomes = runtime.detect(), []
    for method in METHODS:
        outcomes += compare([method], week_experiment(), machine)
        print(experiments.summary(outcomes)[-1], flush=True)
    experiments.write_outcomes(outcomes, runtime.data_folder() / experiments.WEEK_FILE)


if __name__ == "__main__":
    main()
