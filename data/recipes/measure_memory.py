"""Measure the peak memory of short trainings, which plans are compared with: about twenty minutes on
two CPU cores.

    python data/recipes/measure_memory.py          # both
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
    """The same peaks with glibc's allocator as it is, and weights that lie in their file's pages."""
    return measured({})


def measured(environment: dict[str, str]) -> Sweep:
    """All runs, one after the other, with these variables set."""
    runs = [
        (base, method, batch, length, checkpointing)
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


def one_run(base: str, method: str, batch: int, length: int, checkpointing: bool) -> Outcome:
    """Train on rows of `length` tokens, all supervised; the last of several is shorter, so that the
    batch is padded.
    """
    import psutil

    from course_lib import lora, memory, models, runtime, surgery, training
    from course_lib.batching import Example

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
    examples = [Example(ids, ids)] * batch
    if batch > 1:
        examples[-1] = Example(ids[:-PADDED], ids[:-PADDED])
    run = training.finetune(
        loaded,
        examples,
        machine,
        steps=STEPS,
        batch_size=batch,
        learning_rate=1e-5,
        progress=False,
        say=lambda line: None,
    )
    settings = {"base": base, "batch": batch, "length": length, "checkpointing": checkpointing}
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


RECIPES = [peaks, peaks_as_they_are]

if __name__ == "__main__":
    record(RECIPES, "memory_")
