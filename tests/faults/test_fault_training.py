"""Faults in the middle of training: too little memory, and numbers that are not finite."""

import dataclasses
import itertools
import re
import resource
import signal

import psutil
import pytest
import torch
from safetensors.torch import load_file

from course_lib import training
from course_lib.batching import Example
from course_lib.checkpoints import WEIGHTS
from course_lib.objective import summed_loss
from course_lib.training import TrainingError, finetune
from tests.fixtures.broken import PROCESSES, damaged, names
from tests.fixtures.models import CPU, fresh_tiny
from tests.fixtures.runs import QUIET, overflow, same_weights, took_the_same_steps, train

CUDA_ERROR = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 14.74 GiB, 1.20 GiB are free"
)
CPU_ERROR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried 2 "
    "GB"
)


def lost_from(base, folder, step):
    """What is lost of the run in `folder` if the model does not hold the weights of `step`, or a
    checkpoint is not whole.
    """
    saved = load_file(folder / f"checkpoint-{step}" / WEIGHTS)
    held = all(torch.equal(saved[name], weight) for name, weight in base.model.named_parameters())
    return damaged(folder) + ([] if held else ["weights"])


# --- F16: out of memory


class Starved:
    """A loss for which memory suffices for so many examples at a time, from one forward pass on;
    tried: the numbers of examples.
    """

    def __init__(self, rows, error=CUDA_ERROR, from_pass=1, where="forward"):
        self.rows, self.error, self.from_pass, self.where, self.tried = (
            rows,
            error,
            from_pass,
            where,
            [],
        )

    def __call__(self, model, batch):
        self.tried.append(len(batch["input_ids"]))
        if len(self.tried) < self.from_pass or self.tried[-1] <= self.rows:
            return summed_loss(model, batch)
        if self.where == "forward":
            raise self.error

        def fail(gradient):  # when later layers have their gradients already
            hook.remove()
            raise self.error

        hook = model.model.layers[1].mlp.down_proj.weight.register_hook(fail)
        return summed_loss(model, batch)


SHORT_OF_MEMORY = {
    "in the forward pass": ({}, {}, [4, 2, 2, 2, 2]),
    "in the backward pass": ({}, {"where": "backward"}, [4, 2, 2, 2, 2]),
    "in the second micro-batch of a step": (
        {"accumulate": 2},
        {"from_pass": 2},
        [4, 4, 2, 2, 2, 2, 2, 2],
    ),
    "on a CPU": ({}, {"error": CPU_ERROR}, [4, 2, 2, 2, 2]),
}


@pytest.mark.fault("F16", "memory for 2 of 4 examples at a time (faked), noticed {where}")
@pytest.mark.parametrize("where", SHORT_OF_MEMORY)
def test_a_step_that_runs_out_of_memory_is_taken_in_smaller_parts(where, machine, survived):
    options, fault, numbers = SHORT_OF_MEMORY[where]
    undisturbed, expected = train(machine, steps=4, **options)
    starved = Starved(2, **fault)
    base, run = train(machine, steps=4, loss=starved, **options)
    assert starved.tried[: len(numbers)] == numbers
    assert run.notes == ["step 1 ran out of memory: it is taken with 2 examples at a time"]
    assert run.losses == pytest.approx(expected.losses, abs=1e-4)
    survived(said=run.notes[0], lost=[] if took_the_same_steps(base, undisturbed) else ["weights"])


@pytest.mark.fault("F16", "memory for no example (faked), batch_size {batch_size}")
@pytest.mark.parametrize(("batch_size", "numbers"), [(32, [32, 16, 8, 4, 2]), (3, [3, 2, 1])])
def test_the_micro_batch_is_halved_at_most_four_times(batch_size, numbers, machine, tiny, survived):
    starved = Starved(0)
    with pytest.raises(
        TrainingError,
        match="lower batch_size, shorten the examples .max_tokens. or choose a smaller base",
    ) as stop:
        train(machine, tiny, batch_size=batch_size, steps=2, loss=starved)
    assert starved.tried == numbers
    survived(said=stop.value, lost=[] if same_weights(tiny, fresh_tiny()) else ["weights"])


@pytest.mark.fault("F16", "no memory (faked) at step 3 {where}")
@pytest.mark.parametrize("where", ["for the gradients", "in the optimizer"])
def test_a_run_without_memory_goes_on_later_from_its_last_checkpoint(
    where, machine, tiny, tmp_path, monkeypatch, survived
):
    loss = summed_loss
    if where == "for the gradients":
        loss = Starved(0, from_pass=3)
        # the same run, on a machine with less memory
        loss.__qualname__, loss.__code__ = summed_loss.__qualname__, summed_loss.__code__
    else:
        step, calls = torch.optim.AdamW.step, itertools.count(1)

        def starved(optimizer, closure=None):
            if next(calls) == 3:
                raise CUDA_ERROR
            return step(optimizer, closure)

        monkeypatch.setattr(torch.optim.AdamW, "step", starved)
    with pytest.raises(TrainingError, match="step 3 ran out of memory") as stop:
        train(machine, tiny, loss=loss, folder=tmp_path, save_every=1)
    lost = lost_from(tiny, tmp_path, step=2)
    monkeypatch.undo()
    resumed, run = train(machine, folder=tmp_path, save_every=1)
    assert run.resumed_at == 2
    survived(
        said=stop.value,
        lost=lost + ([] if same_weights(resumed, train(machine)[0]) else ["resumed weights"]),
    )


def starved_run(answer):
    """Train with all memory, and with the memory that is mapped now and 120 MB: answers with the
    notes and whether both agree.
    """
    examples = [
        Example(list(range(start, start + 250)), list(range(start, start + 250)))
        for start in range(16)
    ]
    options = {"steps": 2, "batch_size": 16, "learning_rate": 1e-3, "progress": False, "say": QUIET}
    starved, undisturbed = fresh_tiny(), fresh_tiny()
    # the threads of torch reserve address space of their own when they are first used
    finetune(fresh_tiny(), examples[:1], CPU, **(options | {"batch_size": 1}))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(
        resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 120_000_000, limits[1])
    )
    run = finetune(starved, examples, CPU, **options)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    finetune(undisturbed, examples, CPU, **options)
    answer.send((run.notes, bool(took_the_same_steps(starved, undisturbed))))
    signal.pause()


@pytest.mark.slow
@pytest.mark.fault(
    "F16",
    "the system gives the process 120 MB more (RLIMIT_AS), a step with 16 examples takes more",
)
def test_memory_that_the_system_refuses_is_done_without(survived):
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=starved_run, args=(theirs,))
    process.start()
    theirs.close()
    try:
        notes, same = ours.recv()
    finally:
        process.kill()
        process.join()
    survived(said=notes[-1], lost=[] if same else ["weights"])


# --- F17: numbers that are not finite


@pytest.mark.fault("F17", "the loss was {value} at step 3")
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_change(
    value, machine, tiny, tmp_path, survived
):
    steps = itertools.count(1)

    def poisoned(model, batch):
        return summed_loss(model, batch) * (float(value) if next(steps) == 3 else 1.0)

    with pytest.raises(
        TrainingError, match=rf"the loss is {value} at step 3: .*lower learning_rate .now 0.001."
    ) as stop:
        train(machine, tiny, loss=poisoned, folder=tmp_path, save_every=1)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    survived(said=stop.value, lost=lost_from(tiny, tmp_path, step=2))


@pytest.mark.fault("F17", "a gradient was infinite at step 3")
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_change(
    machine, tiny, tmp_path, survived
):
    overflow(tiny, [3])
    with pytest.raises(
        TrainingError, match=r"the gradient norm is (nan|inf) at step 3: stopped before"
    ) as stop:
        train(machine, tiny, folder=tmp_path, save_every=1)
    survived(said=stop.value, lost=lost_from(tiny, tmp_path, step=2))


@pytest.fixture
def t4(machine):
    """The arithmetic of a T4 on the CPU."""
    return dataclasses.replace(machine, dtype="float16")


@pytest.mark.fault("F17", "an fp16 gradient overflowed at step 3 alone")
def test_a_skipped_step_is_counted_and_said(t4, tiny, tmp_path, survived):
    computed_in = set()
    tiny.model.model.layers[0].mlp.register_forward_hook(
        lambda module, inputs, output: computed_in.add(output.dtype)
    )
    overflow(tiny, [3])
    _, run = train(t4, tiny, steps=3, folder=tmp_path, save_every=1)
    assert computed_in == {torch.float16}
    (line,) = run.notes
    assert re.match(
        r"\d of 3 steps were skipped because fp16 gradients overflowed: .* the last step 3", line
    )
    survived(said=line, lost=lost_from(tiny, tmp_path, step=2) + lost_from(tiny, tmp_path, step=3))


@pytest.mark.fault("F17", "fp16 gradients overflowed from step 3 on")
def test_three_skipped_steps_in_a_row_stop_the_run_which_goes_on_in_float32(
    t4, machine, tiny, tmp_path, survived
):
    overflow(tiny, range(3, 9))
    with pytest.raises(
        TrainingError, match="overflowed in 3 steps in a row, the last at step 5: .*or use float32"
    ) as stop:
        train(t4, tiny, steps=8, folder=tmp_path, save_every=1)
    lost = lost_from(tiny, tmp_path, step=4)
    resumed, run = train(machine, steps=8, folder=tmp_path, save_every=1)
    assert run.resumed_at == 4
    assert all(weight.isfinite().all() for weight in resumed.model.parameters())
    survived(said=stop.value, lost=lost)


@pytest.mark.fault("F17", "fp16 gradients overflowed in each of {steps} steps")
@pytest.mark.parametrize(("steps", "last"), [(6, 6), (20, 17)])
def test_a_run_whose_every_step_is_skipped_does_not_pass_for_trained(
    steps, last, t4, tiny, survived
):
    overflow(tiny, range(1, steps + 1))
    with pytest.raises(
        TrainingError, match=f"overflowed in {last} steps in a row, the last at step {last}: "
    ) as stop:
        train(t4, tiny, steps=steps)
    survived(said=stop.value, lost=[] if same_weights(tiny, fresh_tiny()) else ["weights"])


@pytest.mark.fault("F17", "gradients were too large for the first scales of fp16, without a fault")
def test_the_scaler_is_given_the_steps_it_needs_to_find_its_scale(t4, tiny, survived):
    _, run = train(t4, tiny, steps=20, loss=lambda model, batch: 1000 * summed_loss(model, batch))
    (line,) = run.notes
    skipped = int(line.partition(" ")[0])
    assert skipped > training.SKIPS_IN_A_ROW
    assert f"the first was step 1, the last step {skipped}" in line
    survived(said=line, lost=[] if run.losses[-1] < run.losses[skipped] else ["learning"])
