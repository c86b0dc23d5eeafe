"""Does a fine-tuning fit a GPU? The bill of memory, before anything is downloaded.

A dry run on shapes says how many weights train and what each block keeps; from that the bill of
each moment of a step follows, and the peak is the largest of them:

    start of the backward pass         all activations, the logits and their gradients; no gradient
    backward pass of a block           what is kept of the blocks below, gradients of those above,
                                       and what the block works with (checkpointing: all of it)
    backward pass of the embeddings    all gradients, and two more of embeddings that are the head
    step of the optimizer              all gradients, no activation; copies, if it makes some

docs/memory.md says how each term is counted, and how far plans are from measured peaks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from course_lib import (
    alpaca,
    batching,
    dryrun,
    experiments,
    memory,
    models,
    qlora,
    shapes,
    surgery,
)
from course_lib.runtime import CourseError

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
STATES = {  # bytes on the GPU for each trained weight of so many bytes
    "adamw": lambda size: 2 * size,
    "adamw-8bit": lambda size: 2 * (1 + 4 / 256),  # a float32 constant for 256 states
    "paged-adamw": lambda size: 0,  # in the memory of the host while the GPU has none to spare
    "sgd": lambda size: 0,
}
METHODS = {  # label, what its size is, and the size it has by default
    "full": ("full fine-tuning", None, None),
    "lora": ("LoRA", "rank", 16),
    "qlora": ("QLoRA", "rank", 16),
    "adalora": ("AdaLoRA", "rank at the start", 24),
    "prompt": ("prompt tuning", "tokens", 20),
    "prefix": ("prefix tuning", "tokens", 20),
    "ia3": ("IA3", None, None),
    "adapter": ("bottleneck adapters", "width", 64),
    "parallel": ("parallel adapters", "width", 64),
    "bitfit": ("bias tuning", None, None),
    "norms": ("norm tuning", None, None),
}
LOGIT_BYTES = 12  # float32 log-probabilities, their gradient and that of the logits
WIDEST_GRADIENTS = 3  # gradients as wide as the widest layer that a block's backward pass holds
FRAMEWORK_GPU = 500_000_000  # the context of CUDA, and kernels; not measured by this course
FRAMEWORK_CPU = 400_000_000  # Python, torch and transformers, after the first step
BITSANDBYTES = 50_000_000  # on a CPU; taken for GPUs, too
MARGIN = 1 / 0.9  # plans were up to a tenth below what was measured on a GPU
BAR, KNOBS = 32, 3  # characters of the longest bar, knobs in a report
LONGEST = 2**20  # tokens: neither a batch nor a length above it is looked for


@dataclass(frozen=True)
class Recipe:
    """A fine-tuning as one would describe it. Raises CourseError for what cannot be.

    size: of the method, None for its default in METHODS
    targets: layers that LoRA and its relatives adapt, as in `surgery.find_layers`
    dtype: of the base and of what is computed; trained: of the weights that train
    supervised: share of the positions that have a label, and so logits
    shards: GPUs that share weights, gradients and states (FSDP's full sharding, ZeRO stage 3)
    autocast: products in dtype where `trained` is another, as in `course_lib.finetune`
    fused: the optimizer's step needs no copy of the weights, as in `course_lib.finetune`
    accumulate: batches whose gradients are added up before a step of the optimizer
    framework: bytes of libraries and the GPU's context, on top
    """

    model: str
    method: str = "qlora"
    batch: int = 1
    length: int = 512
    checkpointing: bool = False
    optimizer: str = "adamw"
    size: int | None = None
    targets: str | Sequence[str] = surgery.ALL_LINEAR
    dtype: str = "float16"
    trained: str = "float32"
    supervised: float = 1.0
    shards: int = 1
    autocast: bool = True
    fused: bool = True
    accumulate: int = 1
    framework: int = FRAMEWORK_GPU

    def __post_init__(self) -> None:
        shapes.one_of("method", self.method, METHODS)
        shapes.one_of("optimizer", self.optimizer, STATES)
        for name in (self.dtype, self.trained):
            shapes.one_of("dtype", name, SIZES)
        for name in ("batch", "length", "size", "shards", "accumulate"):
            value, most = getattr(self, name), LONGEST
            if not (name == "size" and value is None) and (
                type(value) is not int or not 1 <= value <= most
            ):
                raise CourseError(f"{name}={value!r}, expected a whole number from 1 to {most:,}")
        if not 0 < self.supervised <= 1:
            raise CourseError(f"supervised={self.supervised!r}, expected a share above 0, up to 1")
        if self.size is not None and METHODS[self.method][2] is None:
            raise CourseError(f"{self.method} has no size, found size={self.size}: leave it out")

    @property
    def mixed(self) -> bool:
        return self.autocast and self.trained != self.dtype

    @property
    def prompt(self) -> int:
        """Tokens that the method puts before the text."""
        return self.size_in_use if self.method == "prompt" else 0

    @property
    def virtual(self) -> int:
        """Positions that are taken before the text: those of a prefix, too."""
        return self.size_in_use if self.method in ("prompt", "prefix") else 0

    @property
    def size_in_use(self) -> int:
        return self.size or METHODS[self.method][2] or 0

    def __str__(self) -> str:
        label, what, _ = METHODS[self.method]
        of_size = f" ({what} {self.size_in_use})" if what else ""
        kept = ", checkpointing" if self.checkpointing else ""
        parts = f" x {self.accumulate}" if self.accumulate > 1 else ""
        shared = f" on each of {self.shards} GPUs" if self.shards > 1 else ""
        return (
            f"{self.model}, {label}{of_size}, {self.optimizer}, batch {self.batch}{parts} of "
            f"{self.length:,} tokens{shared}, base {self.dtype}, "
            f"trained {self.trained}{kept}"
        )


@dataclass(frozen=True)
class Bill:
    """Bytes at the moment of the peak, by what they are for.

    moment: when that is
    work: what exists only in passing: gradients of activations, a block that is computed again, a
        weight that is dequantised, copies of the optimizer
    """

    moment: str
    weights: int
    states: int
    gradients: int
    activations: int
    logits: int
    work: int
    framework: int

    @property
    def total(self) -> int:
        return sum(self.rows().values())

    def rows(self) -> dict[str, int]:
        """The terms by name, without the moment."""
        return {field.name: getattr(self, field.name) for field in fields(self)[1:]}


def bill(recipe: Recipe) -> Bill:
    """The bill of a training step's peak, from the second step on, when the states exist."""
    return max(bills(recipe), key=lambda one: one.total)


def bills(recipe: Recipe) -> list[Bill]:
    """The bills of the moments of a step, in their order."""
    shape, size = _shape(recipe), SIZES[recipe.dtype]
    share = SIZES[recipe.trained] / recipe.shards
    trained, always = trained_weights(recipe), _always(recipe)
    length = recipe.length + recipe.prompt
    tokens = recipe.batch * length
    whole = [
        (count + shape.pairs * length) * tokens + row * recipe.batch
        for count, row in zip(shape.kept, shape.rows, strict=True)
    ]
    kept = [count * tokens for count in shape.inputs] if recipe.checkpointing else whole
    casts = [count * size * recipe.mixed for count in shape.trained]  # autocast's, of the weights
    found = []

    def note(moment: str, **terms: float) -> None:
        found.append(Bill(moment, **always, **{name: int(count) for name, count in terms.items()}))

    # gradients: of an earlier batch all are there; else those that the backward pass has made
    gradients = trained * share if recipe.accumulate > 1 else 0.0
    grows = share if recipe.accumulate == 1 else 0.0
    held, passing = sum(kept) + shape.outside * tokens, _passing(recipe)
    logits = LOGIT_BYTES * shape.vocabulary * recipe.batch * recipe.length * recipe.supervised
    work = passing + _sharded(sum(casts), recipe)
    terms = {"gradients": gradients, "activations": held, "logits": logits, "work": work}
    note("start of the backward pass", **terms)
    gradients += grows * (shape.trained_outside - (0 if shape.tied else shape.embeddings))
    for number in reversed(range(len(kept))):
        work = passing + WIDEST_GRADIENTS * shape.widest * size * tokens
        work += _sharded(sum(casts[: number + 1]), recipe)
        work += whole[number] if recipe.checkpointing else 0
        moment = f"backward pass of block {number + 1}"
        note(moment, gradients=gradients, activations=held, logits=0, work=work)
        held -= kept[number]
        gradients += grows * shape.trained[number]
    # tied: the gradient of the head waits, the other comes, and their sum is a third one
    work = 2 * shape.embeddings * share if shape.tied else 0
    moment = "backward pass of the embeddings"
    note(moment, gradients=trained * share, activations=0, logits=0, work=work)
    copies = 0 if recipe.fused else trained * share
    note("step of the optimizer", gradients=trained * share, activations=0, logits=0, work=copies)
    return found


def _always(recipe: Recipe) -> dict[str, int]:
    """What is there in each moment."""
    shape, size, trained = _shape(recipe), SIZES[recipe.dtype], trained_weights(recipe)
    stored = shape.frozen * size
    if recipe.method == "qlora":
        stored += shape.linear * (qlora.bits_per_weight() / 8 - size)
    trained_size = SIZES[recipe.trained]
    states = trained * STATES[recipe.optimizer](trained_size)
    return {
        "weights": int((stored + trained * trained_size) / recipe.shards),
        "states": int(states / recipe.shards),
        "framework": recipe.framework + (BITSANDBYTES if recipe.method == "qlora" else 0),
    }


def _sharded(casts: float, recipe: Recipe) -> float:
    """Casts of sharded weights exist for the gathered block alone, which `_passing` has."""
    return casts if recipe.shards == 1 else 0.0


def _passing(recipe: Recipe) -> float:
    """Weights that exist in passing: those of a block that sharding gathers, one dequantised."""
    shape, size = _shape(recipe), SIZES[recipe.dtype]
    gathered = shape.base / len(shape.kept) * size if recipe.shards > 1 else 0.0
    if recipe.method != "qlora":
        return gathered
    return shape.largest * size + gathered * qlora.bits_per_weight() / (8 * size)


def trained_weights(recipe: Recipe) -> int:
    """How many weights train."""
    shape = _shape(recipe)
    return sum(shape.trained) + shape.trained_outside


def _shape(recipe: Recipe) -> dryrun.Shape:
    return dryrun.shape_of(
        recipe.model,
        "lora" if recipe.method == "qlora" else recipe.method,
        recipe.size_in_use,
        recipe.targets if isinstance(recipe.targets, str) else tuple(recipe.targets),
        getattr(torch, recipe.trained if recipe.method == "full" else recipe.dtype),
        getattr(torch, recipe.dtype) if recipe.mixed else None,
        recipe.batch > 1,
    )


@dataclass(frozen=True)
class Knob:
    """One change to a recipe. costs: in words, with the measurement where the course has one."""

    change: str
    recipe: Recipe
    costs: str


def knobs(recipe: Recipe) -> list[Knob]:
    """What could be turned to save memory, the largest saving first; those that save nothing are
    left out.
    """
    batch, length = recipe.batch, recipe.length
    found = []

    def offer(change: str, costs: str, **changes: object) -> None:
        found.append(Knob(change, replace(recipe, **changes), costs))

    if recipe.method == "full":
        costs = "fewer weights learn; on the task of the week about as well (Day 2)"
        offer("LoRA in place of full fine-tuning", costs, method="lora", size=None)
    if recipe.method in ("lora", "adalora"):
        costs = "4-bit base: loss 9 % higher on the task of the week, about one standard deviation"
        offer(f"QLoRA in place of {METHODS[recipe.method][0]}", costs, method="qlora")
    if recipe.dtype == "float32":
        costs = "16-bit base: fp16 needs a loss scale, bf16 a GPU of capability 8.0"
        offer("base in 16 bits", costs, dtype="float16")
    if not recipe.checkpointing:
        costs = "time: a LoRA step took 1.42 times as long (docs/benchmarks.md)"
        offer("activation checkpointing", costs, checkpointing=True)
    if batch > 1:
        costs = f"time: the same step in {batch} parts, with accumulate={batch}"
        offer("batch 1", costs, batch=1, accumulate=batch * recipe.accumulate)
    if length > 1:
        costs = "longer records are left out"
        offer(f"length {length // 2}", costs, length=length // 2)
    if recipe.optimizer == "adamw":
        costs = "Adam's states in 8 bits, by bitsandbytes; not measured in this course"
        offer("8-bit AdamW", costs, optimizer="adamw-8bit")
        costs = "time while states move over the bus; not measured in this course"
        offer("paged AdamW", costs, optimizer="paged-adamw")
    total = bill(recipe).total
    saved = {id(knob): total - bill(knob.recipe).total for knob in found}
    return sorted(
        (knob for knob in found if saved[id(knob)] > 0), key=lambda knob: -saved[id(knob)]
    )


@dataclass(frozen=True)
class Accuracy:
    """Plans beside peaks that were measured: relative errors, and the run with the worst one.

    kept: bytes by which the same processes were larger at most with their allocator as it is
    """

    errors: list[float]
    worst: str
    kept: int

    def __str__(self) -> str:
        least, most = min(self.errors), max(self.errors)
        return (
            f"beside {len(self.errors)} trainings measured on a CPU, such plans were off by "
            f"{least:+.0%} to {most:+.0%} (worst: {self.worst}), and on it up to {gb(self.kept)} "
            "that the allocator keeps came on top; beside ten that peft's maintainers measured on "
            "a GPU they were up to a tenth too low, and nothing was measured on a GPU for QLoRA, "
            "checkpointing, paging or sharding (docs/memory.md)"
        )


def accuracy() -> Accuracy:
    """The errors of plans for the runs of data/measured/memory_peaks.json."""
    runs = experiments.read("memory_peaks").outcomes
    as_they_are = experiments.read("memory_peaks_as_they_are").outcomes
    errors = [bill(recipe_of(run)).total / run.peak_bytes - 1 for run in runs]
    worst = max(zip(map(abs, errors), runs, strict=True), key=lambda pair: pair[0])[1]
    kept = [other.peak_bytes - run.peak_bytes for run, other in zip(runs, as_they_are, strict=True)]
    return Accuracy(errors, str(recipe_of(worst)), max(kept))


def recipe_of(run: "experiments.Outcome") -> Recipe:
    """What was measured, as one would plan it."""
    return Recipe(
        run.settings["base"],
        run.method,
        run.settings["batch"],
        run.settings["length"],
        run.settings["checkpointing"],
        size=run.settings.get("rank"),
        accumulate=run.settings.get("accumulate", 1),
        supervised=run.settings.get("supervised", 1.0),
        dtype="float32",
        framework=FRAMEWORK_CPU,
    )


def largest_that_fits(recipe: Recipe, name: str, room: int) -> int:
    """The largest batch or length, whichever `name` says, whose peak is within `room` bytes; 0 if
    none is.
    """
    low, high = 0, LONGEST
    while low < high:
        middle = (low + high + 1) // 2
        if bill(replace(recipe, **{name: middle})).total <= room:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True)
class Lengths:
    """Tokens of the records of a file, as the course encodes them. supervised: the most that have
    a label, as a share of the longest.
    """

    path: Path
    records: int
    median: int
    longest: int
    supervised: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.records:,} records, half of them up to {self.median:,} tokens, "
            f"the longest {self.longest:,}, in tokens of tiny; a larger vocabulary "
            "makes fewer, of Chinese several times fewer"
        )


def lengths_of(path: Path | str) -> Lengths:
    """Counted with the tokenizer that comes with the course, `tiny`'s, since others may be far.
    Raises DataError for what is no file of records.
    """
    from transformers import AutoTokenizer

    path = Path(path).expanduser()
    records = alpaca.read_records(path).records
    tokenizer = AutoTokenizer.from_pretrained(models.tiny_folder(), local_files_only=True)
    examples = batching.encode_records(records, tokenizer, LONGEST).examples
    counts = sorted(map(len, examples))
    labels = max(len(example.supervised_ids) for example in examples)
    middle, longest = counts[(len(counts) - 1) // 2], counts[-1]
    return Lengths(path, len(counts), middle, longest, labels / longest)


def report(recipe: Recipe, gpu: str) -> str:
    """What `python -m course_lib plan` prints: the verdict, the bill, what saves most, what fits,
    and how far plans are off.
    """
    config, gpu = shapes.config_of(recipe.model), gpu.strip().lower()
    limit = batching.most_positions(config) - recipe.virtual
    if recipe.length > limit:
        found = f"{recipe.model} reads at most {limit:,} tokens, found length={recipe.length:,}"
        raise CourseError(f"{found}: choose a shorter length or another model")
    if gpu == "cpu" and recipe.optimizer == "paged-adamw":
        raise CourseError("on a CPU there is nothing to page to: choose adamw")
    if recipe.dtype == "bfloat16" and gpu in shapes.NO_BF16:
        raise CourseError(f"a {gpu} has no units for bfloat16 (capability below 8.0): use float16")
    room, peak = shapes.gpu_bytes(gpu), bill(recipe)
    most = max(peak.rows().values())
    lines = [
        str(recipe),
        f"{_verdict(peak.total, room)}: {gb(peak.total)} at the peak, {gb(room)} on the {gpu}.",
        "",
        *(
            f"  {name:<12}{gb(count):>10}  {'#' * round(BAR * count / most)}"
            for name, count in peak.rows().items()
            if count
        ),
        f"  (at its peak, the {peak.moment})",
        "",
        "What saves most:",
    ]
    turned = [one for one in knobs(recipe) if not (gpu == "cpu" and "paged" in one.change)]
    for knob in turned[:KNOBS]:
        then = bill(knob.recipe).total
        lines.append(
            f"  {knob.change}: saves {gb(peak.total - then)}, then {gb(then)} "
            f"{_word(then, room)}; costs {knob.costs}"
        )
    batch = largest_that_fits(recipe, "batch", int(room / MARGIN))
    length = min(largest_that_fits(recipe, "length", int(room / MARGIN)), limit)
    at_length = (
        f"batch {batch:,} at {recipe.length:,} tokens" if batch else "no batch at this length"
    )
    at_batch = (
        f"{length:,} tokens at batch {recipe.batch:,}" if length else "no length at this batch"
    )
    lines.append(f"Largest that fits with a tenth to spare: {at_length}, or {at_batch}.")
    cache = memory.kv_cache_bytes(config, recipe.batch, recipe.length, SIZES[recipe.dtype])
    lines.append(f"Generating as many tokens afterwards takes {gb(cache)} for keys and values.")
    lines.append(f"How sure: {accuracy()}.")
    return "\n".join(lines)


def _verdict(total: int, room: int) -> str:
    left = {
        "fits": f"{gb(room - total)} left",
        "may fit": f"{gb(room - total)} left is less than plans can be off",
        "does not fit": f"{gb(total - room)} over",
    }
    word = _word(total, room)
    return f"It {word}, {left[word]}"


def _word(total: int, room: int) -> str:
    return "does not fit" if total > room else "may fit" if total * MARGIN > room else "fits"


def gb(count: float) -> str:
    """Bytes for readers: three digits, in GB or MB.

    >>> gb(4_210_000_000), gb(36_715_216), gb(999_900_000), gb(0)
    ('4.21 GB', '36.7 MB', '1.00 GB', '0.00 MB')
    """
    unit, value = "MB", float(f"{count / 1e6:.3g}")
    if value >= 1000:
        unit, value = "GB", float(f"{count / 1e9:.3g}")
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f} {unit}"
