"""Tests of course_lib.checkpoints: a resumed run is the unbroken one.

More of them, with faults, are in tests/faults.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from course_lib.checkpoints import OPTIMIZER, PROGRESS, RANDOM, WEIGHTS, CheckpointError
from course_lib.lora import add_lora
from course_lib.sealing import SEAL
from tests.fixtures.models import fresh_tiny
from tests.fixtures.runs import same_weights, train


def test_a_resumed_run_equals_an_unbroken_one(machine, tmp_path):
    unbroken, expected = train(machine)
    train(machine, folder=tmp_path, save_every=2)
    shutil.rmtree(tmp_path / "checkpoint-6")  # as if the process had died after step 4
    lines = []
    resumed, run = train(machine, folder=tmp_path, save_every=2, say=lines.append)
    assert lines == ["going on from checkpoint-4"] == run.notes
    assert run.resumed_at == 4
    assert run.losses == expected.losses
    assert same_weights(resumed, unbroken)


def test_a_finished_run_is_not_trained_again(machine, tmp_path):
    first, _ = train(machine, folder=tmp_path, save_every=3)
    second, run = train(machine, folder=tmp_path, save_every=3)
    assert run.resumed_at == 6
    assert same_weights(first, second)


def test_only_the_newest_checkpoints_are_kept(machine, tmp_path):
    train(machine, folder=tmp_path, save_every=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-6"]


def test_folders_of_other_programs_are_left_alone(machine, tmp_path):
    for name in ("checkpoint-1", "checkpoint-100", "checkpoint-best"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    train(machine, folder=tmp_path, save_every=2)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == [
        "checkpoint-1",
        "checkpoint-100",
        "checkpoint-4",
        "checkpoint-6",
        "checkpoint-7",
        "checkpoint-best",
    ]


def test_a_checkpoint_holds_tensors_and_json_alone(machine, tmp_path):
    _, run = train(machine, folder=tmp_path, save_every=3)
    checkpoint = tmp_path / "checkpoint-3"
    assert {path.name for path in checkpoint.iterdir()} == {
        WEIGHTS,
        OPTIMIZER,
        RANDOM,
        PROGRESS,
        SEAL,
    }
    assert len(load_file(checkpoint / OPTIMIZER)) == 3 * len(load_file(checkpoint / WEIGHTS))
    assert json.loads((checkpoint / PROGRESS).read_text())["losses"] == run.losses[:3]


def test_frozen_weights_are_not_kept(machine, tmp_path):
    base = fresh_tiny()
    add_lora(base.model, 2, 4, ["q_proj"])
    train(machine, base, steps=1, folder=tmp_path, save_every=1)
    assert all(
        name.endswith((".A", ".B")) for name in load_file(tmp_path / "checkpoint-1" / WEIGHTS)
    )


def test_dropout_goes_on_as_if_nothing_had_happened(machine, tmp_path):
    def run(folder):
        base = fresh_tiny()
        base.model.model.layers[1].mlp.act_fn = nn.Sequential(
            base.model.model.layers[1].mlp.act_fn, nn.Dropout(0.3)
        )
        return train(machine, base, steps=4, folder=folder, save_every=2)

    unbroken, _ = run(tmp_path / "unbroken")
    (tmp_path / "broken").mkdir()
    (tmp_path / "unbroken" / "checkpoint-2").rename(tmp_path / "broken" / "checkpoint-2")
    torch.manual_seed(99)
    resumed, outcome = run(tmp_path / "broken")
    assert outcome.resumed_at == 2
    assert same_weights(resumed, unbroken)


def test_a_run_goes_on_only_from_the_weights_it_started_from(machine, tmp_path):
    """Another base, another adapter of the same shape, or a model that another run has trained."""

    def adapter_of(seed):
        base = fresh_tiny()
        add_lora(base.model, 2, 4, ["q_proj"], seed=seed)
        return base

    def other_base():
        base = adapter_of(0)
        base.model.model.norm.weight.data[0] += 1e-3
        return base

    def trained_elsewhere():
        base = adapter_of(0)
        train(machine, base, steps=2, folder=tmp_path / "elsewhere", save_every=1)
        return base

    train(machine, adapter_of(0), folder=tmp_path / "run", save_every=2)
    for start in (lambda: adapter_of(1), other_base, trained_elsewhere):
        base = start()
        before = {name: weight.clone() for name, weight in base.model.named_parameters()}
        with pytest.raises(
            CheckpointError, match=r"weights at the start .*: load the base again or another folder"
        ):
            train(machine, base, folder=tmp_path / "run", save_every=2)
        assert all(torch.equal(before[name], w) for name, w in base.model.named_parameters())
    _, run = train(machine, adapter_of(0), folder=tmp_path / "run", save_every=2)
    assert run.resumed_at == 6


def test_a_broken_off_run_goes_on_in_the_same_kernel_on_the_same_model(machine, tmp_path):
    unbroken, _ = train(machine)
    base = fresh_tiny()
    with pytest.raises(KeyboardInterrupt):
        train(machine, base, folder=tmp_path, save_every=2, after_step=Stopping(3))
    _, run = train(machine, base, folder=tmp_path, save_every=2, after_step=Stopping(None))
    assert run.resumed_at == 2
    assert same_weights(base, unbroken)
    _, again = train(machine, base, folder=tmp_path, save_every=2, after_step=Stopping(None))
    assert again.resumed_at == 6, "the cell may run once more"


class Stopping:
    """An `after_step` that is interrupted at a step, as by a reader."""

    def __init__(self, at):
        self.at = at

    def __call__(self, model, step):
        if step == self.at:
            raise KeyboardInterrupt
