"""Methods compared over seeds on one task: the table of the week, and the sweeps of a day.

    methods = [Method(f"LoRA r={r}", 5e-3, adapted(rank=r)) for r in (1, 4, 16)]
    outcomes = compare(methods, world_experiment(), machine)
    plots.table(summary(outcomes))

A seed decides the order of the examples and the random start of what a method adds; the base and the split stay the same. So the
spread over seeds does not contain the chance in the choice of the test questions, which the standard error of a rate does.
"""

import gc
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from course_lib import evaluation, models, training, world
from course_lib.alpaca import DataError, Record
from course_lib.batching import encode_records
from course_lib.lora import add_lora
from course_lib.runtime import CourseError, Machine, data_folder, seed_everything
from course_lib.surgery import ALL_LINEAR, Targets

if TYPE_CHECKING:
    from course_lib.models import Loaded

SEEDS = (0, 1, 2)
WEEK_FILE = "table_of_the_week.json"
QUALITY_FILE = "data_quality.json"
EFFECTS_FILE = "tiny_llama/effects.json"
LORA_FILE = "lora_effects.json"
MAX_TOKENS = 256  # above every record of both experiments; a longer one stops the comparison
Prepare = Callable[["Loaded"], None]


@dataclass(frozen=True)
class Method:
    """A way to train. prepare: changes `base.model` before training (freezes it, wraps it, quantises it); None trains all weights.

    learning_rate: None leaves the model as `prepare` made it, for a first row or for quantisation without training
    mask_prompt: False trains on the prompt, too
    quantize: of the base, as in `models.load`
    """

    name: str
    learning_rate: float | None
    prepare: Prepare | None = None
    mask_prompt: bool = True
    quantize: str | None = None


@dataclass(frozen=True)
class Experiment:
    """What methods are compared on. base: a name of `models`.

    score: named measures of a trained base: "response loss" in nats, all others rates from 0 to 1
    """

    base: str
    train: Sequence[Record]
    score: Callable[["Loaded"], dict[str, float]]
    steps: int
    batch_size: int
    warmup_steps: int = 0


@dataclass(frozen=True)
class Outcome:
    """One method, one seed. trained: weights with a gradient; seconds and peak_bytes: of training, 0 without it.

    On a CPU peak_bytes is the resident memory of the whole process: on the tiny model that is mostly the libraries.
    """

    method: str
    seed: int
    trained: int
    scores: dict[str, float]
    seconds: float
    peak_bytes: int


def world_experiment(
    train: Sequence[Record] | None = None, test: Sequence[Record] | None = None, steps: int = 150, batch_size: int = 16
) -> Experiment:
    """The 18 instruction tasks of the generated world, for `tiny`: response loss and exact match on 540 held-out records.

    "not hard" is the exact match without the hard tasks. There is no validation split: a learning rate chosen here is chosen on the
    test records, so compare methods at several.
    """
    test = world.read_world("test") if test is None else test

    def score(base: "Loaded") -> dict[str, float]:
        answers = evaluation.score_answers(base, test)
        hard = [record.extra.get("task") in world.HARD for record in test]
        scores = {"response loss": answers.loss, "exact match": answers.exact_rate}
        if any(hard) and not all(hard):
            easy = [exact for exact, is_hard in zip(answers.exact, hard, strict=True) if not is_hard]
            scores["not hard"] = sum(easy) / len(easy)
        return scores

    return Experiment("tiny", world.read_world("train") if train is None else train, score, steps, batch_size)


def week_experiment() -> Experiment:
    """The task of the week on the small model, with Day 1's recipe: the whole test split, and what is retained."""
    test, questions = evaluation.read_task("test"), evaluation.read_retention()

    def score(base: "Loaded") -> dict[str, float]:
        answers = evaluation.evaluate(base, test)
        return {
            "response loss": evaluation.score_answers(base, test).loss,
            "valid JSON": answers.rate("valid_json"),
            "right topic": answers.rate("right_topic"),
            "right answer": answers.rate("right_answer"),
            "retention": evaluation.evaluate_retention(base, questions).rate,
        }

    return Experiment("smollm2-135m", evaluation.read_task("train"), score, steps=32, batch_size=4, warmup_steps=3)


def adapted(rank: int, alpha: float | None = None, targets: Targets = ALL_LINEAR, rank_stabilized: bool = False) -> Prepare:
    """LoRA on the linear layers that `targets` means; alpha is twice the rank if not given. A run's seed draws the A's."""

    def prepare(base: "Loaded") -> None:
        scale = 2 * rank if alpha is None else alpha
        add_lora(base.model, rank, scale, targets, rank_stabilized=rank_stabilized, seed=torch.initial_seed())

    return prepare


def last_blocks(count: int) -> Prepare:
    """Train the last blocks of the model, and nothing else. Raises CourseError, once it meets a model, if that has fewer."""

    def prepare(base: "Loaded") -> None:
        blocks = len(base.model.model.layers)
        if not isinstance(count, int) or not 1 <= count <= blocks:
            raise CourseError(f"count={count!r} must be a whole number in 1..{blocks}, the blocks of {base.name}: choose one")
        base.model.requires_grad_(False)
        base.model.model.layers[-count:].requires_grad_(True)

    return prepare


def compare(
    methods: Sequence[Method], experiment: Experiment, machine: Machine, seeds: Sequence[int] = SEEDS, progress: bool = True
) -> list[Outcome]:
    """Train every method with every seed, each from a fresh base, and score it. A method without training is scored once.

    Raises CourseError if a name or a seed stands twice, if the base cannot be had, or if a run fails; it names the run.
    """
    names = [method.name for method in methods]
    if not methods or not seeds or len(set(names)) < len(names) or len(set(seeds)) < len(seeds):
        raise CourseError(f"found methods {names} and seeds {list(seeds)}, expected at least one of each, all different")
    runs = [(method, seed) for method in methods for seed in (seeds if method.learning_rate is not None else seeds[:1])]
    outcomes = []
    for method, seed in tqdm(runs, desc="runs", unit="run", file=sys.stdout, disable=not progress):
        try:
            outcomes.append(_run(method, seed, experiment, machine))
        except CourseError as error:
            raise CourseError(f"{method.name}, seed {seed}: {error}") from None
        gc.collect()  # the model of this run, or memory would grow from run to run
    return outcomes


def _run(method: Method, seed: int, experiment: Experiment, machine: Machine) -> Outcome:
    seed_everything(seed)
    base = models.load(experiment.base, machine, quantize=method.quantize, say=_quiet)
    if base.name != experiment.base:
        raise CourseError(f"this comparison needs {experiment.base}, found {base.origin}")
    if method.prepare is not None:
        method.prepare(base)
    if method.learning_rate is None:
        return Outcome(method.name, seed, 0, experiment.score(base), 0.0, 0)
    encoding = encode_records(experiment.train, base.tokenizer, MAX_TOKENS, mask_prompt=method.mask_prompt)
    if encoding.refused:
        raise CourseError(f"a training record was refused: {encoding.refused[0]}")
    run = training.finetune(
        base,
        encoding.examples,
        machine,
        steps=experiment.steps,
        batch_size=experiment.batch_size,
        warmup_steps=experiment.warmup_steps,
        learning_rate=method.learning_rate,
        seed=seed,
        progress=False,
        say=_quiet,
    )
    trained = sum(weight.numel() for weight in base.model.parameters() if weight.requires_grad)
    return Outcome(method.name, seed, trained, experiment.score(base), run.seconds, run.peak_bytes)


def _quiet(line: str) -> None:
    pass


def summary(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row a method: weights trained, every score as mean ± standard deviation over seeds, seconds, the largest peak in GB.

    Response loss is in nats, all other scores are rates, shown in percent.

    >>> outcomes = [Outcome("LoRA", seed, 8, {"exact match": rate}, 2.0, 10**9) for seed, rate in enumerate((0.5, 0.7))]
    >>> summary(outcomes)
    [{'method': 'LoRA', 'trained': '8', 'exact match': '60.0 ± 14.1', 'seconds': '2.0 ± 0.0', 'peak GB': '1.00', 'seeds': 2}]
    """
    rows = []
    for name in dict.fromkeys(outcome.method for outcome in outcomes):
        runs = [outcome for outcome in outcomes if outcome.method == name]
        row: dict[str, Any] = {"method": name, "trained": f"{runs[0].trained:,}"}
        for measure in runs[0].scores:
            values = [run.scores[measure] for run in runs]
            row[measure] = spread(values, ".3f") if measure == "response loss" else spread([100 * value for value in values], ".1f")
        was_trained = runs[0].trained > 0
        row["seconds"] = spread([run.seconds for run in runs], ".1f") if was_trained else ""
        row["peak GB"] = f"{max(run.peak_bytes for run in runs) / 1e9:.2f}" if was_trained else ""
        rows.append(row | {"seeds": len(runs)})
    return rows


def spread(values: Sequence[float], digits: str) -> str:
    """Mean ± standard deviation (of a sample); one value stands alone.

    >>> spread([1.0, 2.0, 3.0], ".1f"), spread([1.0], ".1f")
    ('2.0 ± 1.0', '1.0')
    """
    mean = format(statistics.mean(values), digits)
    return f"{mean} ± {format(statistics.stdev(values), digits)}" if len(values) > 1 else mean


def learned_and_kept(outcomes: Sequence[Outcome]) -> dict[str, list[tuple[float, float]]]:
    """Response loss and retention in percent of every trained run, by method; of its name a learning rate at the end is left out.

    Raises CourseError for a run that was not scored on both.

    >>> learned_and_kept([Outcome("LoRA, 0.001", 0, 8, {"response loss": 0.2, "retention": 0.9}, 2.0, 10**9)])
    {'LoRA': [(0.2, 90.0)]}
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for outcome in outcomes:
        if outcome.trained:
            if not {"response loss", "retention"} <= outcome.scores.keys():
                found = f"{outcome.method} has the scores {', '.join(outcome.scores)}"
                raise CourseError(f"{found}, expected response loss and retention: compare on week_experiment()")
            method = re.sub(r", [\d.e-]+$", "", outcome.method)
            points.setdefault(method, []).append((outcome.scores["response loss"], 100 * outcome.scores["retention"]))
    return points


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table, for model cards and datasheets.

    >>> print(markdown([{"method": "LoRA", "seeds": 3}]))
    | method | seeds |
    |---|---|
    | LoRA | 3 |
    """
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"|{'|'.join(cells)}|" if cells[0] == "---" else f"| {' | '.join(map(str, cells))} |" for cells in lines)


def write_outcomes(outcomes: Sequence[Outcome], path: Path) -> None:
    """Keep outcomes in a JSON file."""
    path.write_text(json.dumps(as_json(outcomes), indent=1) + "\n", encoding="utf-8")


def as_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Outcomes as JSON objects, numbers rounded to what can be believed."""
    rows = [asdict(outcome) for outcome in outcomes]
    for row in rows:
        row["scores"] = {name: round(value, 4) for name, value in row["scores"].items()}
        row["seconds"] = round(row["seconds"], 1)
    return rows


def read_effect(name: str, file: str = EFFECTS_FILE) -> list[Outcome]:
    """A measured effect by its name, such as "prompt_masking". file: in data/, EFFECTS_FILE (all on `tiny`) or LORA_FILE."""
    path = data_folder() / file
    try:
        effects = json.loads(path.read_text(encoding="utf-8"))
        outcomes = {effect: [Outcome(**row) for row in rows] for effect, rows in effects.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{path} holds no measured effects: restore it, or measure again as data/README.md says") from None
    if name not in outcomes:
        raise CourseError(f"effect {name!r} was not measured, expected one of {', '.join(outcomes)}")
    return outcomes[name]


def read_outcomes(path: Path | None = None) -> list[Outcome]:
    """Outcomes kept by `write_outcomes`; by default the table of the week."""
    path = path or data_folder() / WEEK_FILE
    try:
        outcomes = [Outcome(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, RecursionError):
        outcomes = []
    if not outcomes:
        raise DataError(f"{path} holds no outcomes of experiments: restore it, or measure again as data/README.md says")
    return outcomes
