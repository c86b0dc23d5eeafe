"""Measure the peak memory of short trainings, which plans are compared with: about half an hour on
two CPU cores.

    python data/recipes/measure_memory.py          # all
    python data/recipes/measure_memory.py peaks    # one

Writes data/measured/memory_NAME.json.
"""

import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

from recording import record

from course_lib.experiments import Measure, Outcome, Sweep
from course_lib.runtime import Machine

STEPS = 3  # the optimizer's states exist from the second on
RANK, PADDED = 16, 8
BASES = {"smollm2-135m": (128, 512), "tiny": (64, 256)}  # and two lengths, in tokens
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}
METHODS = ("full", "lora", "qlora")
BATCHES = (1, 4)


def peaks(machine: Machine) -> Sweep:
    """Resident memory at the peak of three training steps, and before the model was loaded, each
    run in a process of its own, whose allocator gives freed memory back to the system.

    Otherwise glibc keeps pieces below 32 MB for itself, and the pages of the model's file count
    while a weight lies in them: `peaks_as_they_are`.
    """
    return measured(GIVES_BACK)


def peaks_as_they_are(machine: Machine) -> Sweep:
    """The same peaks with glibc's allocator as it is, and weights in the pages of their file."""
    return measured({})


def peaks_held_out(machine: Machine) -> Sweep:
    """As `peaks`, other trainings of SmolLM2, which no constant of the planner was chosen on: two
    rows of 384 tokens, an eighth of them labelled, two batches accumulated.
    """
    runs = [
        ("smollm2-135m", method, 2, 384, checkpointing, 2, 1 / 8)
        for method, checkpointing in itertools.product(METHODS, (False, True))
    ]
    return measured(GIVES_BACK, runs)


def measured(environment: dict[str, str], runs: list[tuple] | None = None) -> Sweep:
    """The runs, one after the other, with these variables set; all of BASES if None."""
    runs = runs or [
        (base, method, batch, length, checkpointing, 1, 1.0)
        for base, lengths in BASES.items()
        for method, batch, length, checkpointing in itertools.product(
            METHODS, BATCHES, lengths, (False, True)
        )
    ]
    os.environ.update(environment)  # read by the allocator when a process begins
    outcomes = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as one_at_a_time:
        for outcome in one_at_a_time.map(one_run, *zip(*runs, strict=True)):
            print(outcome.label, f"{outcome.peak_bytes / 1e9:.2f} GB", flush=True)
            outcomes.append(outcome)
    for name in environment:
        del os.environ[name]
    return Sweep(outcomes, {"before the model": Measure("GB")})


def one_run(
    base: str,
    method: str,
    batch: int,
    length: int,
    checkpointing: bool,
    accumulate: int,
    supervised: float,
) -> Outcome:
    """Train on rows of `length` tokens, of which the last are labelled; the last of several rows is
    shorter, so that the batch is padded.
    """
    import psutil

    from course_lib import lora, memory, models, runtime, surgery, training
    from course_lib.batching import IGNORED, Example

    machine = runtime.detect()
    before = psutil.Process().memory_info().rss
    quantize = "nf4" if method == "qlora" else None
    loaded = models.load(base, machine, quantize=quantize, say=lambda line: None)
    if os.environ.items() >= GIVES_BACK.items():
        for weight in loaded.model.parameters():
            weight.data = weight.data.clone()
    if method != "full":
        lora.add_lora(loaded.model, RANK, RANK, surgery.ALL_LINEAR)
    memory.checkpoint_blocks(
        loaded.model, len(memory.blocks_of(loaded.model)) if checkpointing else 0
    )
    ids = [10 + index % 1000 for index in range(length)]
    labels = [IGNORED] * round(length * (1 - supervised))
    labels += ids[len(labels) :]
    rows = [Example(ids, labels)] * batch
    if batch > 1:
        rows[-1] = Example(ids[:-PADDED], labels[:-PADDED])
    run = training.finetune(
        loaded,
        rows * accumulate,
        machine,
        steps=STEPS,
        batch_size=batch,
        accumulate=accumulate,
        learning_rate=1e-5,
        progress=False,
        say=lambda line: None,
    )
    settings = {"base": base, "batch": batch, "length": length, "checkpointing": checkpointing}
    settings |= {} if accumulate == 1 else {"accumulate": accumulate, "supervised": supervised}
    settings |= {} if method == "full" else {"rank": RANK}
    return Outcome(
        method=method,
        settings=settings,
        seed=0,
        trained=surgery.count_parameters(loaded.model).trained,
        scores={"before the model": round(before / 1e9, 3)},
        seconds=round(run.seconds, 1),
        peak_bytes=run.peak_bytes,
    )


RECIPES = [peaks, peaks_as_they_are, peaks_held_out]

if __name__ == "__main__":
    record(RECIPES, "memory_")
