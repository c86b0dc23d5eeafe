"""Methods compared over seeds on one task: the table of the week, and the sweeps of a day.

    methods = [Method("LoRA", 5e-3, {"rank": r}, adapted(rank=r)) for r in (1, 4, 16)]
    sweep = compare(methods, world_experiment(), machine)
    plots.table(summary(sweep))

An outcome is one method with one seed. It carries its settings, and a sweep the units of its
scores, so that nothing is read out of a name. Committed sweeps are JSON files in data/measured/,
one schema: `read` gives them back, `write` keeps a new one.

A seed decides the order of the examples and the random start of what a method adds; the base and
the split stay the same. So the spread over seeds does not contain the chance in the choice of the
test questions; the 95 % interval of a rate does.
"""

import gc
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from course_lib import evaluation, models, training, world
from course_lib.adalora import Budget, add_adalora, penalized_loss
from course_lib.alpaca import DataError, Record
from course_lib.batching import encode_records
from course_lib.lora import add_lora
from course_lib.runtime import CourseError, Machine, data_folder, seed_everything
from course_lib.surgery import ALL_LINEAR, Targets

if TYPE_CHECKING:
    from course_lib.models import Loaded

SEEDS = (0, 1, 2)
MAX_TOKENS = 256  # above every record of both experiments; a longer one stops the comparison
DIGITS = {  # after the point
    "nats": 3,
    "percent": 1,
    "perplexity": 2,
    "seconds": 1,
    "GB": 2,
    "rank": 1,
}
Prepare = Callable[["Loaded"], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Method:
    """A way to train. settings: what tells it from others of its name, beside the learning rate.

    learning_rate: None leaves the model as `prepare` made it, for a first row or for quantisation
        without training
    prepare: changes `base.model` before training (freezes it, wraps it), and can return options of
        `finetune`, such as its two seams; None trains all weights
    mask_prompt: False trains on the prompt, too
    quantize: of the base, as in `models.load`
    """

    name: str
    learning_rate: float | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    prepare: Prepare | None = None
    mask_prompt: bool = True
    quantize: str | None = None

    @property
    def all_settings(self) -> dict[str, Any]:
        rate = {} if self.learning_rate is None else {"learning rate": self.learning_rate}
        return dict(self.settings) | rate


@dataclass(frozen=True)
class Measure:
    """unit: "nats", "percent", "perplexity"; questions: how many a percentage is of, None for other
    units.
    """

    unit: str
    questions: int | None = None


COSTS = {"time": Measure("seconds"), "peak memory": Measure("GB")}  # of training, in every sweep


@dataclass(frozen=True)
class Experiment:
    """What methods are compared on. base: a name of `models`; score: the measures of a trained
    base, in their units.
    """

    base: str
    train: Sequence[Record]
    measures: Mapping[str, Measure]
    score: Callable[..., dict[str, float]]
    steps: int
    batch_size: int
    warmup_steps: int = 0


@dataclass(frozen=True)
class Outcome:
    """One method, one seed. trained: weights with a gradient; seconds and peak_bytes: of training,
    0 without it.

    On a CPU peak_bytes is the resident memory of the whole process: on the tiny model that is
    mostly the libraries.
    """

    method: str
    settings: dict[str, Any]
    seed: int
    trained: int
    scores: dict[str, float]
    seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def values(self) -> dict[str, float]:
        """Scores and costs."""
        return self.scores | {"time": self.seconds, "peak memory": self.peak_bytes / 1e9}

    @property
    def label(self) -> str:
        """Method and settings, for readers.

        >>> settings = {"rank": 8, "layers": "q and v", "learning rate": 0.002}
        >>> Outcome("LoRA", settings, 0, 8, {}).label
        'LoRA, rank 8, q and v, learning rate 0.002'
        """
        parts = [
            str(value) if isinstance(value, str) else f"{name} {value:g}"
            for name, value in self.settings.items()
        ]
        return ", ".join([self.method, *parts])


@dataclass(frozen=True)
class Sweep:
    """Outcomes, with what their scores mean. about: one sentence; recipe: the command that measured
    them.
    """

    outcomes: list[Outcome]
    measures: Mapping[str, Measure]
    about: str = ""
    recipe: str = ""

    def where(self, *methods: str, **settings: Any) -> "Sweep":
        """The outcomes of these methods, all if none is named, with these settings; "_" in a name
        stands for a space.
        """
        wanted = {name.replace("_", " "): value for name, value in settings.items()}
        chosen = [
            outcome
            for outcome in self.outcomes
            if (not methods or outcome.method in methods)
            and all(outcome.settings.get(name) == value for name, value in wanted.items())
        ]
        return replace(self, outcomes=chosen)

    def __add__(self, other: "Sweep") -> "Sweep":
        """Both, on the measures that they share."""
        shared = {
            name: measure for name, measure in self.measures.items() if name in other.measures
        }
        return replace(self, outcomes=[*self.outcomes, *other.outcomes], measures=shared)

    def by_label(self) -> dict[str, list[Outcome]]:
        """The seeds of each method with its settings, in the order of the file."""
        labels = dict.fromkeys(outcome.label for outcome in self.outcomes)
        return {
            label: [outcome for outcome in self.outcomes if outcome.label == label]
            for label in labels
        }

    def mean(self, measure: str) -> float:
        """Over all outcomes, in the measure's unit; of COSTS, too."""
        return statistics.mean(outcome.values[measure] for outcome in self.outcomes)


def world_experiment(
    train: Sequence[Record] | None = None,
    test: Sequence[Record] | None = None,
    steps: int = 150,
    batch_size: int = 16,
) -> Experiment:
    """The 18 instruction tasks of the generated world, for `tiny`: response loss and exact match on
    540 held-out records.

    "not hard" is the exact match without the hard tasks. There is no validation split: a learning
    rate chosen here is chosen on the test records, so compare methods at several.
    """
    test = world.read_world("test") if test is None else test

    easy = [record.extra.get("task") not in world.HARD for record in test]
    measures = {"response loss": Measure("nats"), "exact match": Measure("percent", len(test))}
    if any(easy) and not all(easy):
        measures["not hard"] = Measure("percent", sum(easy))

    def score(base: "Loaded") -> dict[str, float]:
        answers = evaluation.score_answers(base, test)
        exact_and_easy = sum(
            exact and is_easy for exact, is_easy in zip(answers.exact, easy, strict=True)
        )
        scores = {
            "response loss": answers.loss,
            "exact match": 100 * answers.exact_rate,
            "not hard": 100 * exact_and_easy / max(1, sum(easy)),
        }
        return {name: scores[name] for name in measures}

    return Experiment(
        "tiny",
        world.read_world("train") if train is None else train,
        measures,
        score,
        steps,
        batch_size,
    )


def week_experiment() -> Experiment:
    """The task of the week on the small model, with Day 1's recipe: the whole test split, and of
    plain questions the share that is retained of those that the untouched model answers, and
    gained of the others.
    """
    test = evaluation.read_task("test")
    plain = {"retention": evaluation.read_retention(), "gained": evaluation.read_unknown()}
    rates = ("valid JSON", "right topic", "right answer")
    measures = {"response loss": Measure("nats")} | dict.fromkeys(
        rates, Measure("percent", len(test))
    )
    for name, questions in plain.items():
        measures[name] = Measure("percent", len(questions))

    def score(base: "Loaded", shots: Sequence[Record] = ()) -> dict[str, float]:
        few = 8 if shots else 64  # at a time: their prompts are long
        answers = evaluation.evaluate(base, test, few, shots)
        scores = {"response loss": evaluation.score_answers(base, test, few, shots).loss}
        scores |= {name: 100 * answers.rate(name.lower().replace(" ", "_")) for name in rates}
        for name, questions in () if shots else plain.items():  # the examples are of the task
            scores[name] = 100 * evaluation.evaluate_retention(base, questions).rate
        return scores

    return Experiment(
        "smollm2-135m",
        evaluation.read_task("train"),
        measures,
        score,
        steps=32,
        batch_size=4,
        warmup_steps=3,
    )


def adapted(
    rank: int,
    alpha: float | None = None,
    targets: Targets = ALL_LINEAR,
    rank_stabilized: bool = False,
) -> Prepare:
    """LoRA on the linear layers that `targets` means; alpha is twice the rank if not given.

    A run's seed draws the A's.
    """

    def prepare(base: "Loaded") -> None:
        scale = 2 * rank if alpha is None else alpha
        add_lora(
            base.model,
            rank,
            scale,
            targets,
            rank_stabilized=rank_stabilized,
            seed=torch.initial_seed(),
        )

    return prepare


def budgeted(
    rank: int,
    target_rank: float,
    steps: int,
    alpha: float | None = None,
    budget: type[Budget] = Budget,
) -> Prepare:
    """AdaLoRA on all linear layers, from `rank` to `target_rank` on average in a run of `steps`;
    alpha is twice the rank if not given.

    The first tenth of the steps comes before the first pruning, the last third after the last. A
    run's seed draws the P's and Q's.
    """

    def prepare(base: "Loaded") -> Mapping[str, Any]:
        scale = 2 * rank if alpha is None else alpha
        add_adalora(base.model, rank, scale, ALL_LINEAR, seed=torch.initial_seed())
        phases = {"initial_steps": steps // 10, "final_steps": steps // 3}
        chosen = budget(base.model, target_rank, steps=steps, **phases)
        return {"loss": penalized_loss, "after_step": chosen}

    return prepare


def added(add: Callable[..., None], *arguments: Any, **options: Any) -> Prepare:
    """A method of `prefix` or `adapters`: add(model, *arguments, **options). A run's seed draws
    what starts at random.
    """

    def prepare(base: "Loaded") -> None:
        drawn = {"seed": torch.initial_seed()} if "seed" in signature(add).parameters else {}
        add(base.model, *arguments, **options, **drawn)

    return prepare


def last_blocks(count: int) -> Prepare:
    """Train the last blocks of the model, and nothing else.

    Raises CourseError, once it meets a model, if that has fewer.
    """

    def prepare(base: "Loaded") -> None:
        blocks = len(base.model.model.layers)
        if not isinstance(count, int) or not 1 <= count <= blocks:
            raise CourseError(
                f"count={count!r} must be a whole number in 1..{blocks}, the blocks of "
                f"{base.name}: choose one"
            )
        base.model.requires_grad_(False)
        base.model.model.layers[-count:].requires_grad_(True)

    return prepare


def compare(
    methods: Sequence[Method],
    experiment: Experiment,
    machine: Machine,
    seeds: Sequence[int] = SEEDS,
    progress: bool = True,
) -> Sweep:
    """Train every method with every seed, each from a fresh base, and score it.

    A method without training is scored once.

    Raises CourseError if a method or a seed stands twice, if the base cannot be had, or if a run
    fails; it names the run.
    """
    labels = [Outcome(method.name, method.all_settings, 0, 0, {}).label for method in methods]
    if not methods or not seeds or len(set(labels)) < len(labels) or len(set(seeds)) < len(seeds):
        raise CourseError(
            f"found methods {labels} and seeds {list(seeds)}, expected at least one of each, all "
            "different"
        )
    runs = [
        (method, seed)
        for method in methods
        for seed in (seeds if method.learning_rate is not None else seeds[:1])
    ]
    outcomes = []
    for method, seed in tqdm(runs, desc="runs", unit="run", file=sys.stdout, disable=not progress):
        try:
            outcomes.append(_run(method, seed, experiment, machine))
        except CourseError as error:
            raise CourseError(f"{labels[methods.index(method)]}, seed {seed}: {error}") from None
        gc.collect()  # the model of this run, or memory would grow from run to run
    return Sweep(outcomes, experiment.measures)


def _run(method: Method, seed: int, experiment: Experiment, machine: Machine) -> Outcome:
    quiet = lambda line: None  # noqa: E731
    seed_everything(seed)
    base = models.load(experiment.base, machine, quantize=method.quantize, say=quiet)
    if base.name != experiment.base:
        raise CourseError(f"this comparison needs {experiment.base}, found {base.origin}")
    options = method.prepare(base) if method.prepare is not None else None
    if method.learning_rate is None:
        return Outcome(method.name, method.all_settings, seed, 0, experiment.score(base))
    encoding = encode_records(
        experiment.train, base.tokenizer, MAX_TOKENS, mask_prompt=method.mask_prompt
    )
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
        say=quiet,
        **(options or {}),
    )
    trained = sum(weight.numel() for weight in base.model.parameters() if weight.requires_grad)
    scores = experiment.score(base)
    return Outcome(
        method.name, method.all_settings, seed, trained, scores, run.seconds, run.peak_bytes
    )


def at_best_rates(sweep: Sweep, measure: str) -> Sweep:
    """Of each method with its settings the runs at one learning rate: the one with the best mean of
    `measure`, which is the lowest of nats and perplexities, the highest of percentages. CourseError
    if one rate has more seeds than another.

    >>> runs = [
    ...     Outcome("LoRA", {"rank": 2, "learning rate": rate}, 0, 8, {"exact match": score})
    ...     for rate, score in ((0.1, 50.0), (0.2, 70.0), (0.4, 60.0))
    ... ]
    >>> best = at_best_rates(Sweep(runs, {"exact match": Measure("percent", 100)}), "exact match")
    >>> list(best.by_label())
    ['LoRA, rank 2, learning rate 0.2']
    """
    sign = 1 if sweep.measures[measure].unit == "percent" else -1
    best: dict[str, list[Outcome]] = {}
    for runs in sweep.by_label().values():
        fixed = {name: value for name, value in runs[0].settings.items() if name != "learning rate"}
        label = replace(runs[0], settings=fixed).label
        so_far = best.get(label, runs)
        if len(runs) != len(so_far):  # the fewer there are, the more chance decides
            found = f"{runs[0].label} has {len(runs)} seeds, another rate {len(so_far)}"
            raise CourseError(f"{found}: measure as many of each rate")
        means = [
            sign * statistics.mean(run.scores[measure] for run in some) for some in (runs, so_far)
        ]
        if means[0] >= means[1]:
            best[label] = runs
    return replace(sweep, outcomes=[run for runs in best.values() for run in runs])


def summary(sweep: Sweep, *measures: str) -> list[dict[str, Any]]:
    """A row a method: weights trained, the measures as mean ± standard deviation over seeds.

    measures: all of the sweep if none is named; of COSTS, too. A percentage also has its 95 %
        interval as a rate of its questions, the chance in their choice: `evaluation.interval`.

    >>> scores = ({"exact match": 50.0}, {"exact match": 70.0})
    >>> runs = [Outcome("LoRA", {"rank": 2}, seed, 8, score) for seed, score in enumerate(scores)]
    >>> (row,) = summary(Sweep(runs, {"exact match": Measure("percent", 100)}))
    >>> row["method"], row["trained"], row["exact match (percent)"], row["seeds"]
    ('LoRA, rank 2', '8', '60.0 ± 14.1 [50, 69]', 2)
    """
    rows = []
    for label, runs in sweep.by_label().items():
        row: dict[str, Any] = {"method": label, "trained": f"{runs[0].trained:,}"}
        for name in measures or sweep.measures:
            measure = (sweep.measures | COSTS)[name]
            values = [run.values[name] for run in runs if name in run.values]
            if not values:  # not asked of this method
                row[f"{name} ({measure.unit})"] = "—"
                continue
            text = spread(values, DIGITS[measure.unit]) if any(values) or name not in COSTS else ""
            if measure.questions:
                text += " [{:.0f}, {:.0f}]".format(
                    *evaluation.interval(statistics.mean(values), measure.questions)
                )
            row[f"{name} ({measure.unit})"] = text
        rows.append(row | {"seeds": len(runs)})
    return rows


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation (of a sample); one value stands alone.

    >>> spread([1.0, 2.0, 3.0], 1), spread([1.0], 2)
    ('2.0 ± 1.0', '1.00')
    """
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table, for model cards and datasheets.

    >>> print(markdown([{"method": "LoRA", "seeds": 3}]))
    | method | seeds |
    |---|---|
    | LoRA | 3 |
    """
    lines = [
        f"| {' | '.join(map(str, cells))} |" for cells in (rows[0], *(row.values() for row in rows))
    ]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


def path_of(name: str) -> Path:
    return data_folder() / "measured" / f"{name}.json"


def write(sweep: Sweep, name: str) -> None:
    """Keep a sweep as data/measured/NAME.json, numbers rounded to what can be believed."""
    content = asdict(sweep)
    for outcome in content["outcomes"]:
        outcome["scores"] = {
            measure: round(value, 4) for measure, value in outcome["scores"].items()
        }
        outcome["seconds"] = round(outcome["seconds"], 1)
    order = ("about", "recipe", "measures", "outcomes")
    text = json.dumps({key: content[key] for key in order}, indent=1)
    path_of(name).write_text(text + "\n", encoding="utf-8")


def read(name: str) -> Sweep:
    """A committed sweep by the name of its file, such as "week".

    Raises CourseError, which lists them, and DataError for a damaged file.
    """
    path = path_of(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.json")))
        raise CourseError(f"sweep {name!r} was not measured, expected one of {known}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        measures = {measure: Measure(**about) for measure, about in content["measures"].items()}
        outcomes = [Outcome(**outcome) for outcome in content["outcomes"]]
        if not outcomes or any(
            not outcome.scores.keys() <= measures.keys() for outcome in outcomes
        ):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(
            f"{path} holds no sweep: restore it, or measure again as data/README.md says"
        ) from None
    return Sweep(outcomes, measures, content["about"], content["recipe"])
