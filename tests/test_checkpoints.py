"""Tests of course_lib.checkpoints: a resumed run is the unbroken one.

More of them, with faults, are in tests/faults.
"""

import json
import random
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from course_lib.checkpoints import OPTIMIZER, PROGRESS, RANDOM, WEIGHTS, CheckpointError
from course_lib.lora import add_lora
from course_lib.objective import summed_loss
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


def test_a_loss_that_draws_with_pythons_generator_goes_on_as_well(machine, tmp_path):
    def noisy(model, batch):
        return summed_loss(model, batch) * random.uniform(0.5, 1.5)

    settings = {"steps": 4, "save_every": 2, "loss": noisy}
    unbroken, whole = train(machine, folder=tmp_path / "whole", **settings)
    (tmp_path / "broken").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "broken" / "checkpoint-2")
    random.seed(99)
    resumed, run = train(machine, folder=tmp_path / "broken", **settings)
    assert (run.resumed_at, run.losses) == (2, whole.losses)
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


def test_a_checkpoint_of_another_program_is_not_replaced(machine, tmp_path):
    foreign = tmp_path / "checkpoint-4" / "model.safetensors"
    foreign.parent.mkdir()
    foreign.write_bytes(b"weights of another trainer")
    with pytest.raises(CheckpointError, match="checkpoint-4 is of another program .it holds model"):
        train(machine, folder=tmp_path, save_every=2)
    assert foreign.read_bytes() == b"weights of another trainer"


def test_a_refused_start_leaves_nothing_that_a_later_run_trips_over(machine, tmp_path):
    base, folder = fresh_tiny(), tmp_path / "run"
    folder.write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written"):
        train(machine, base, folder=folder, save_every=2)
    folder.unlink()
    with pytest.raises(KeyboardInterrupt):
        train(machine, base, folder=folder, save_every=2, after_step=Stopping(5))
    _, run = train(machine, folder=folder, save_every=2, after_step=Stopping(None))
    assert run.resumed_at == 4


@pytest.mark.parametrize("gone", [False, True])
def test_a_trained_model_is_no_start(machine, tmp_path, gone):
    """Interrupted before the first checkpoint, or its checkpoints are gone."""
    base, folder = fresh_tiny(), tmp_path / "run"
    if gone:
        train(machine, base, folder=folder, save_every=2)
        shutil.rmtree(folder)
    else:
        with pytest.raises(KeyboardInterrupt):
            train(machine, base, folder=folder, save_every=6, after_step=Stopping(3))
    with pytest.raises(CheckpointError, match="was trained in .* already, and no checkpoint is"):
        train(machine, base, folder=folder, save_every=6, after_step=Stopping(None))


class Keeping:
    """An `after_step` with a state."""

    def __init__(self, state):
        self.state = state

    def __call__(self, model, step):
        pass

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_a_state_of_numbers_is_refused_before_the_first_step(machine, tmp_path):
    base = fresh_tiny()
    with pytest.raises(CheckpointError, match="holds 'best', a float, expected tensors"):
        train(machine, base, folder=tmp_path, save_every=2, after_step=Keeping({"best": 9.0}))
    assert same_weights(base, fresh_tiny())


def test_a_state_of_tensors_that_share_memory_is_kept(machine, tmp_path):
    average = torch.arange(3.0)
    hook = Keeping({"a": average, "b": average})
    train(machine, folder=tmp_path, save_every=2, after_step=hook)
    again = Keeping({"a": torch.zeros(3), "b": torch.zeros(3)})
    train(machine, folder=tmp_path, save_every=2, after_step=again)
    assert torch.equal(again.state["b"], average)


def test_two_runs_do_not_share_a_folder(machine, tmp_path):
    def another(model, step):
        with pytest.raises(CheckpointError, match="another run is using"):
            train(machine, folder=tmp_path, save_every=2)

    train(machine, folder=tmp_path, save_every=2, after_step=another)


def weighted(weight):
    def loss(model, batch):
        return weight * summed_loss(model, batch)

    return loss


@pytest.mark.parametrize(
    "change",
    [
        lambda base: {"loss": weighted(0.5)},
        lambda base: {"loss": partial(weighted(1.0))},
        lambda base: {"loss": weighted(1.0), "after_step": lambda model, step: 1},
        lambda base: base.model.model.rotary_emb.inv_freq.mul_(0.5) is None,
        lambda base: setattr(base.model.config, "rms_norm_eps", 0.5),
    ],
)
def test_a_run_with_another_loss_hook_or_config_is_another(machine, tmp_path, change):
    given = {"loss": weighted(1.0), "after_step": lambda model, step: 0}
    train(machine, folder=tmp_path, save_every=2, **given)
    base = fresh_tiny()
    changed = change(base)
    with pytest.raises(CheckpointError, match="is of another run"):
        train(machine, base, folder=tmp_path, save_every=2, **given | (changed if changed else {}))


def test_the_working_folder_keeps_no_checkpoints(machine):
    with pytest.raises(CheckpointError, match="give one of their own"):
        train(machine, folder="", save_every=2)
