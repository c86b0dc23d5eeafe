"""Measure the table of the week as far as it exists, three seeds each: about 25 minutes on two CPU
cores.

    python data/recipes/measure_week.py        # both
    python data/recipes/measure_week.py week   # one

Writes data/measured/week.json and plain_questions.json. Learning rates were chosen on the
validation split:
docs/decisions.md.
"""

from dataclasses import replace

from recording import record

from course_lib import models
from course_lib.evaluation import draw_examples, evaluate_retention, read_retention, read_unknown
from course_lib.experiments import (
    Measure,
    Method,
    Outcome,
    Sweep,
    adapted,
    compare,
    last_blocks,
    week_experiment,
)
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
    trained = compare(methods, week_experiment(), machine)
    first, *others = trained.outcomes
    return replace(trained, outcomes=[first, *prompted(machine), *others])


def prompted(machine: Machine) -> list[Outcome]:
    """Ten examples of the training split in the prompt, one of each topic in random order, and no
    training; a seed is another draw.
    """
    base, outcomes = models.load("smollm2-135m", machine), []
    for seed in (0, 1, 2):
        scores = week_experiment().score(base, draw_examples(seed))
        outcomes.append(Outcome("ten examples in the prompt", {}, seed, 0, scores))
    return outcomes


WORDINGS = (
    "{}",
    "Please tell me: {}",
    "I have a question. {}",
    "Answer in a few words: {}",
    "{} Answer briefly.",
)


def plain_questions(machine: Machine) -> Sweep:
    """The plain questions of the table of the week in other words, to the untouched SmolLM2-135M:
    how many answers come and go although no weight has moved.
    """
    base = models.load("smollm2-135m", machine)
    asked = {"retention": read_retention(), "gained": read_unknown()}
    measures = {name: Measure("percent", len(questions)) for name, questions in asked.items()}
    outcomes = []
    for wording in WORDINGS:
        scores = {}
        for name, questions in asked.items():
            put = [replace(each, question=wording.format(each.question)) for each in questions]
            scores[name] = 100 * evaluate_retention(base, put).rate
        outcomes.append(Outcome("untouched", {"asked as": wording.format("…")}, 0, 0, scores))
    return Sweep(outcomes, measures)


RECIPES = (week, plain_questions)

if __name__ == "__main__":
    record(RECIPES)
