"""Faults of checkpoints: a full disk, a killed process, and files that are damaged, of another run
or hostile.

A folder without the right to write cannot be made here: tests often run as root, who may write
everywhere. A file in the way and an error as of a read-only disk stand in for it.
"""

import contextlib
import errno
import functools
import hashlib
import itertools
import pickle
import pkgutil
import random
import re
import resource
import shutil
import signal
import tempfile
import time
import unittest.mock
from collections import Counter

import pytest
from safetensors import SafetensorError

from course_lib import sealing
from course_lib.batching import encode_records
from course_lib.checkpoints import OPTIMIZER, PROGRESS, RANDOM, WEIGHTS, CheckpointError
from course_lib.training import finetune
from tests.fixtures.broken import (
    PROCESSES,
    Malicious,
    cut,
    damaged,
    die_at,
    empty,
    flip_a_byte,
    names,
    snapshot,
)
from tests.fixtures.models import CPU, fresh_tiny
from tests.fixtures.rows import first_fast
from tests.fixtures.runs import QUIET, RECORDS, same_weights, train

STEPS = 4


def no_fault():
    """The process is left alone."""


def short_run(answer, folder, fault):
    """Train `tiny` with a checkpoint after each step; say when it begins, and at the end what the
    weights and the run are.
    """
    base = fresh_tiny()
    examples = encode_records(RECORDS, base.tokenizer, max_tokens=1000).examples
    fault()
    answer.send("begins")
    options = {
        "steps": STEPS,
        "batch_size": 1,
        "learning_rate": 1e-3,
        "save_every": 1,
        "progress": False,
        "say": QUIET,
    }
    run = finetune(base, examples, CPU, folder=folder, **options)
    weights = b"".join(weight.detach().numpy().tobytes() for weight in base.model.parameters())
    answer.send((hashlib.sha256(weights).hexdigest(), run))
    signal.pause()


@contextlib.contextmanager
def process_of(folder, fault=no_fault):
    """A short run in a process of its own, which is killed at the end of the block, and the
    connection on which it answers.
    """
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=short_run, args=(theirs, folder, fault))
    process.start()
    theirs.close()
    assert ours.recv() == "begins"
    try:
        yield ours
    finally:
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL


def outcome(folder, fault=no_fault):
    with process_of(folder, fault) as answer:
        return answer.recv()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Of a short run that nothing disturbed: the fingerprint of its weights, the run, and the
    seconds from save to save.
    """
    folder = tmp_path_factory.mktemp("unbroken")
    weights, run = outcome(folder)
    before, last = ((folder / f"checkpoint-{step}").stat().st_mtime for step in (STEPS - 1, STEPS))
    return weights, run, last - before


@pytest.fixture(scope="module")
def finished(machine, tmp_path_factory):
    """A run that nothing disturbed, with checkpoints of steps 4 and 6: what was trained, and the
    folder.
    """
    folder = tmp_path_factory.mktemp("finished")
    base, _ = train(machine, folder=folder, save_every=2)
    return base, folder


@pytest.fixture
def kept(finished, tmp_path):
    """A copy of the finished run's folder."""
    return shutil.copytree(finished[1], tmp_path / "run")


# --- F7: a full disk

NO_SPACE = SafetensorError(
    "Error while serializing: I/O error: No space left on device (os error 28)"
)
FULL_DISK = {  # what is called there, for which time in a checkpoint, and what it says
    "at the weights": ("course_lib.checkpoints.save_file", 1, NO_SPACE),
    "at the optimizer": ("course_lib.checkpoints.save_file", 2, NO_SPACE),
    "at the seal": (
        "course_lib.sealing.publish",
        1,
        OSError(errno.ENOSPC, "No space left on device"),
    ),
}


def on_any_disk(line):
    return re.sub(r"\d+ MB are free", "… MB are free", line)


@pytest.mark.fault("F7", "the disk was full {place} of a checkpoint")
@pytest.mark.parametrize("place", FULL_DISK)
def test_a_full_disk_costs_the_checkpoint_and_not_the_run(
    place, finished, machine, tmp_path, monkeypatch, survived
):
    name, call, error = FULL_DISK[place]
    real, calls = pkgutil.resolve_name(name), itertools.count(1)

    def full(*arguments, **options):
        if (tmp_path / ".partial-checkpoint-4").exists() and next(calls) == call:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(name, full)
    base, run = train(machine, folder=tmp_path, save_every=2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-6"]
    taken = sum(path.stat().st_size for path in (tmp_path / "checkpoint-6").iterdir())
    (line,) = run.notes
    assert re.search(r"takes about (\d+) MB, \d+ MB are free", line)[1] == f"{taken / 1e6:.0f}"
    survived(
        said=on_any_disk(line),
        lost=damaged(tmp_path) + ([] if same_weights(base, finished[0]) else ["weights"]),
    )


def limit_files_after_a_checkpoint(bytes_at_most):
    """The system gives this process no larger file once a checkpoint is written."""
    publish = sealing.publish

    def publish_and_limit(*arguments):
        publish(*arguments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_at_most, resource.RLIM_INFINITY))

    sealing.publish = publish_and_limit


@pytest.mark.slow
@pytest.mark.fault(
    "F7",
    "after the first checkpoint the system took no file above {megabytes} MB (RLIMIT_FSIZE): "
    "{what}",
)
@pytest.mark.parametrize(
    ("megabytes", "what"), [(1, "no weights"), (6, "weights, but no optimizer")]
)
def test_the_first_checkpoint_outlives_a_disk_that_takes_no_more(
    megabytes, what, tmp_path, unbroken, survived
):
    weights, run = outcome(
        tmp_path, functools.partial(limit_files_after_a_checkpoint, megabytes * 10**6)
    )
    assert names(tmp_path) == ["checkpoint-1"]
    assert len(run.notes) == STEPS - 1
    assert "MB are free; training goes on" in run.notes[0]
    resumed, again = outcome(tmp_path)
    assert again.resumed_at == 1
    lost = [
        what
        for what, found in {"weights": weights, "resumed weights": resumed}.items()
        if found != unbroken[0]
    ]
    survived(said=on_any_disk(run.notes[0]), lost=lost)


def test_the_size_that_is_said_counts_frozen_weights_once(machine, tiny, tmp_path, monkeypatch):
    tiny.model.model.requires_grad_(False)
    tiny.model.model.layers[0].requires_grad_(True)
    _, run = train(machine, tiny, steps=2, folder=tmp_path, save_every=1)
    taken = sum(path.stat().st_size for path in (tmp_path / "checkpoint-2").iterdir())
    shutil.rmtree(tmp_path / "checkpoint-2")
    name, _, error = FULL_DISK["at the seal"]
    monkeypatch.setattr(name, unittest.mock.Mock(side_effect=error))
    _, run = train(machine, tiny, steps=2, folder=tmp_path, save_every=1)
    assert f"takes about {taken / 1e6:.0f} MB" in run.notes[-1]


# --- F8: a folder that cannot be written


def read_only(**where):
    raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.fault("F8", "the folder for checkpoints {why}")
@pytest.mark.parametrize("why", ["lies under a file", "lies on a read-only disk (injected)"])
def test_a_folder_that_cannot_be_written_is_refused_before_training(
    why, machine, tiny, tmp_path, monkeypatch, survived
):
    folder = tmp_path
    if why == "lies under a file":
        (tmp_path / "file").write_text("in the way")
        folder = tmp_path / "file" / "run"
    else:
        monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    before = snapshot(tmp_path)
    with pytest.raises(
        CheckpointError, match="cannot be written .*: choose another folder"
    ) as stop:
        train(machine, tiny, folder=folder, save_every=2)
    changed = [] if same_weights(tiny, fresh_tiny()) else ["weights"]
    survived(said=stop.value, lost=changed + ([] if snapshot(tmp_path) == before else ["files"]))


# --- F9 and F10: a killed process


def lost_after(folder, unbroken):
    """Start a killed run again, and say what differs at its end from the unbroken one; and what it
    said itself.
    """
    weights, run = outcome(folder)
    lost = [] if weights == unbroken[0] else ["weights"]
    lost += [] if run.losses == unbroken[1].losses else ["losses"]
    lost += (
        []
        if names(folder) == [f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"]
        else ["order in the folder"]
    )
    return lost + damaged(folder), run


IN_A_STEP = {
    "in the forward pass of step 3": ("course_lib.objective.supervised_logits", 3),
    "in the backward pass of step 3": ("torch.Tensor.backward", 3),
    "between the update and the save of step 3": ("course_lib.checkpoints.Keeper.save", 3),
}


@pytest.mark.fault("F9", "killed with SIGKILL {place}")
@pytest.mark.parametrize("place", first_fast(IN_A_STEP))
def test_a_run_killed_in_a_step_goes_on_from_the_step_before(place, tmp_path, unbroken, survived):
    with pytest.raises(EOFError):
        outcome(tmp_path, functools.partial(die_at, *IN_A_STEP[place]))
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    lost, run = lost_after(tmp_path, unbroken)
    assert run.resumed_at == 2
    survived(said=run.notes[0], lost=lost)


IN_THE_SAVE_OF_STEP_3 = {  # what is called there, for which time, and what then lies in the folder
    "with the weights written, the optimizer not": (
        "course_lib.checkpoints.save_file",
        8,
        "1 2 .3",
    ),
    "with everything written, not sealed": ("course_lib.sealing.seal", 3, "1 2 .3"),
    "with everything sealed, not in its place": ("os.replace", 3, "1 2 .3"),
    "with the new one in its place, the old one there": ("pathlib.Path.rename", 1, "1 2 3"),
    "while the old one was deleted": ("os.rmdir", 1, ".1 2 3"),
}


@pytest.mark.fault("F10", "killed with SIGKILL while it saved, {place}")
@pytest.mark.parametrize("place", first_fast(IN_THE_SAVE_OF_STEP_3))
def test_a_run_killed_while_it_saves_goes_on_from_what_is_whole(
    place, tmp_path, unbroken, survived
):
    *function_and_call, left = IN_THE_SAVE_OF_STEP_3[place]
    with pytest.raises(EOFError):
        outcome(tmp_path, functools.partial(die_at, *function_and_call))
    whole = [f"checkpoint-{step}" for step in left.split() if "." not in step]
    partial = [f"{sealing.PARTIAL}checkpoint-{step[1:]}" for step in left.split() if "." in step]
    assert names(tmp_path) == sorted(partial + whole), "it was not killed in this save"
    lost, run = lost_after(tmp_path, unbroken)
    assert f"checkpoint-{run.resumed_at}" == whole[-1]
    survived(said=run.notes[0], lost=lost)


def newest_step(folder):
    return max(
        [0, *(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))]
    )


@pytest.mark.slow
@pytest.mark.fault("F9", "killed with SIGKILL at 20 random moments of training and saving")
def test_20_runs_killed_at_random_moments_end_with_the_weights_of_the_unbroken_one(
    tmp_path, unbroken, survived
):
    _, run, a_step = unbroken
    first_step = run.seconds - (STEPS - 1) * a_step
    moments, went_on_from, in_a_save, lost = random.Random(1), Counter(), 0, []
    for number in range(20):
        folder = tmp_path / str(number)
        steps_before, part_of_a_step = divmod(moments.random() * STEPS, 1)
        with process_of(folder):
            while newest_step(folder) < steps_before:
                time.sleep(0.001)
            time.sleep(part_of_a_step * (a_step if steps_before else first_step))
        in_a_save += any(folder.glob(f"{sealing.PARTIAL}*"))
        lost_here, run = lost_after(folder, unbroken)
        went_on_from[run.resumed_at] += 1
        lost += [f"{what} of run {number}" for what in lost_here]
    assert 0 < in_a_save < 20
    assert len(went_on_from) > 2
    steps = ", ".join(f"{times} from step {step}" for step, times in sorted(went_on_from.items()))
    survived(
        said=f"going on from checkpoint-N ({in_a_save} were killed in a save; they went on "
        f"{steps})",
        lost=lost,
    )


# --- F11 and F12: a newest checkpoint that is not whole


DAMAGES = {
    "is an empty folder": empty,
    "has truncated weights": lambda folder: cut(folder / WEIGHTS),
    "has no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "has one flipped bit": lambda folder: flip_a_byte(folder / WEIGHTS),
    "has no progress in its progress.json": lambda folder: (folder / PROGRESS).write_bytes(b""),
    "has a progress.json that is not JSON": lambda folder: (folder / PROGRESS).write_text("<html>"),
    "has a foreign file": lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"),
    "has no seal": lambda folder: (folder / sealing.SEAL).unlink(),
    "has no optimizer.safetensors": lambda folder: (folder / OPTIMIZER).unlink(),
    "has a truncated optimizer.safetensors": lambda folder: cut(folder / OPTIMIZER),
}


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(
            what,
            marks=pytest.mark.fault(
                "F12" if "optimizer" in what else "F11", "the newest checkpoint {damage}"
            ),
        )
        for what in DAMAGES
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    damage, finished, kept, machine, survived
):
    DAMAGES[damage](kept / "checkpoint-6")
    resumed, run = train(machine, folder=kept, save_every=2)
    assert run.resumed_at == 4
    assert re.match(r"checkpoint-6.*: passed over", run.notes[0])
    survived(
        said=run.notes[0],
        lost=damaged(kept) + ([] if same_weights(resumed, finished[0]) else ["weights"]),
    )


# --- F13: a checkpoint of something else

OTHERS = {
    "another learning rate": ({"learning_rate": 1e-2}, r"learning_rate 0.001 there, 0.01 now"),
    "another base": ({"name": "smollm2-135m"}, r"base tiny there, smollm2-135m now"),
    "other data": ({"records": RECORDS[1:]}, r"examples \w{12} there, \w{12} now"),
    "fewer trained weights": (
        {"trained": "norm"},
        r"trained weights \d+ \(\w{12}\) there, 128 \(\w{12}\) now",
    ),
}


def only(base, part):
    """The base, of which this part alone is trained."""
    base.model.requires_grad_(False)
    base.model.model.get_submodule(part).requires_grad_(True)
    return base


@pytest.mark.fault("F13", "the checkpoint is of a run with {what}")
@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_another_run_is_refused_with_the_differences(
    what, kept, machine, tiny, survived
):
    options, difference = OTHERS[what]
    options = dict(options)
    tiny.name = options.pop("name", tiny.name)
    base = only(tiny, options.pop("trained", ""))
    before = snapshot(kept)
    with pytest.raises(
        CheckpointError,
        match=rf"of another run \({difference}\): use these settings again or another folder",
    ) as stop:
        train(machine, base, folder=kept, save_every=2, **options)
    changed = [] if same_weights(tiny, fresh_tiny()) else ["weights"]
    survived(said=stop.value, lost=changed + ([] if snapshot(kept) == before else ["files"]))


@pytest.mark.fault(
    "F13", "the checkpoint is of a run with as many trained weights in another place"
)
def test_weights_of_another_place_are_not_taken_for_ours(machine, tmp_path, survived):
    options = {"steps": 2, "folder": tmp_path, "save_every": 1}
    train(machine, only(fresh_tiny(), "layers.0.self_attn.q_proj"), **options)
    before = snapshot(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"trained weights 16384 \(\w+\) there, 16384 \(\w+\) now"
    ) as stop:
        train(machine, only(fresh_tiny(), "layers.0.self_attn.k_proj"), **options)
    survived(said=stop.value, lost=[] if snapshot(tmp_path) == before else ["files"])


@pytest.mark.fault("F13", "the newest checkpoint is a pickled one of another program")
def test_a_checkpoint_of_another_program_is_neither_loaded_nor_deleted(
    finished, kept, canary, machine, survived
):
    foreign = kept / "checkpoint-100"
    foreign.mkdir()
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
        (foreign / name).write_bytes(pickle.dumps(Malicious(canary)))
    before = snapshot(foreign)
    resumed, run = train(machine, folder=kept, save_every=2)
    assert run.resumed_at == 6
    lost = (
        []
        if same_weights(resumed, finished[0]) and snapshot(foreign) == before
        else ["weights or files"]
    )
    survived(said=run.notes[0], lost=lost + [canary] * canary.exists())


# --- F14: malicious pickles


def swap(checkpoint, name, canary, sealed_again):
    """Put a malicious pickle in place of a file; `pytorch_model.bin` stands in place of
    model.safetensors.
    """
    facts = sealing.check(checkpoint)
    if name == "pytorch_model.bin":
        (checkpoint / WEIGHTS).unlink()
    (checkpoint / name).write_bytes(pickle.dumps(Malicious(canary), protocol=2))
    if sealed_again:
        (checkpoint / sealing.SEAL).unlink()
        sealing.seal(checkpoint, list(checkpoint.iterdir()), facts)


@pytest.mark.fault("F14", "a malicious pickle in place of {name}")
@pytest.mark.parametrize("name", [OPTIMIZER, WEIGHTS, "pytorch_model.bin"])
def test_a_malicious_pickle_does_not_match_the_seal(
    name, finished, kept, canary, machine, survived
):
    swap(kept / "checkpoint-6", name, canary, sealed_again=False)
    resumed, run = train(machine, folder=kept, save_every=2)
    assert run.resumed_at == 4
    survived(
        said=run.notes[0],
        lost=[canary] * canary.exists()
        + ([] if same_weights(resumed, finished[0]) else ["weights"]),
    )


@pytest.mark.fault("F14", "a malicious pickle in place of {name}, and the checkpoint sealed again")
@pytest.mark.parametrize("name", [OPTIMIZER, PROGRESS, RANDOM, WEIGHTS, "pytorch_model.bin"])
def test_a_malicious_pickle_under_a_whole_seal_is_not_loaded(
    name, finished, kept, canary, machine, survived
):
    shutil.rmtree(kept / "checkpoint-6")
    older = shutil.copytree(kept / "checkpoint-4", kept / "checkpoint-3")
    swap(kept / "checkpoint-4", name, canary, sealed_again=True)
    before = snapshot(older)
    with pytest.raises(
        CheckpointError, match="checkpoint-4 is not what it was sealed as .*: delete it"
    ) as stop:
        train(machine, folder=kept, save_every=2)
    survived(
        said=stop.value,
        lost=[canary] * canary.exists() + ([] if snapshot(older) == before else ["checkpoint-3"]),
    )


def test_a_pickle_beside_the_files_is_never_read(kept, canary, machine):
    shutil.rmtree(kept / "checkpoint-6")
    swap(kept / "checkpoint-4", "training_args.bin", canary, sealed_again=True)
    _, run = train(machine, folder=kept, save_every=2)
    assert run.resumed_at == 4
    assert not canary.exists()
