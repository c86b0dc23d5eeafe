"""Measure the table of the week as far as it exists, three seeds each: about 25 minutes on two CPU
cores.

    python data/recipes/measure_week.py

Writes data/measured/week.json. Learning rates were chosen on the validation split:
docs/decisions.md.
"""

from recording import record

from course_lib.experiments import Method, Sweep, adapted, compare, last_blocks, week_experiment
from course_lib.runtime import Machine
from course_lib.surgery import ALL_LINEAR


def week(machine: Machine) -> Sweep:
    """The task of the week on SmolLM2-135M, every method at its own learning rate: 32 steps of 4
    questions.
    """
    methods = [
        Method("untouched", None),
        Method("full fine-tuning", 1e-4),
        Method("last blocks", 6e-4, {"blocks": 8}, last_blocks(8)),
        *(
            Method("LoRA", rate, {"rank": 8, "layers": layers}, adapted(8, targets=targets))
            for layers, targets, rate in (
                ("q and v", ["q_proj", "v_proj"], 5e-3),
                ("all linear layers", ALL_LINEAR, 2e-3),
            )
        ),
    ]
    return compare(methods, week_experiment(), machine)


RECIPES = (week,)

if __name__ == "__main__":
    record(RECIPES)
