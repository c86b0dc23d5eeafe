"""Faults of AdaLoRA: budgets that cannot be, training in which nobody prunes, runs that are broken
off amid the prunings, files whose ranks do not fit.
"""

import json

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from course_lib import models
from course_lib.adalora import Budget, adalora_layers, add_adalora, penalized_loss
from course_lib.adapter_files import CONFIG, WEIGHTS, load_adapter, save_adapter
from course_lib.checkpoints import CheckpointError
from course_lib.lora import merged_copy
from course_lib.runtime import CourseError
from course_lib.sealing import SEAL
from tests.fixtures.broken import PROCESSES, die_at
from tests.fixtures.models import fresh_tiny
from tests.fixtures.runs import QUIET, same_weights, train

RANK, TARGET, STEPS = 4, 2, 8
LAYERS = ["q_proj", "v_proj"]


def with_adalora(base=None):
    base = base or fresh_tiny()
    add_adalora(base.model, RANK, 8, LAYERS)
    return base


def budget_of(model, **options):
    numbers = {"steps": STEPS, "initial_steps": 1, "final_steps": 2}
    return Budget(model, **{"target_rank": TARGET} | numbers | options)


def run(machine, base=None, budget=budget_of, **options):
    base = base or with_adalora()
    options = {"steps": STEPS, "loss": penalized_loss} | options
    return train(machine, base, after_step=budget(base.model), **options)


def refused(action, model, message, error=CourseError):
    """How a fault is said, and which weights of the model are not as they were."""
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(error, match=message) as stop:
        action()
    now = dict(model.named_parameters())
    assert now.keys() == before.keys()
    lost = [name for name, weight in before.items() if not torch.equal(now[name], weight)]
    return {"said": stop.value, "lost": lost}


# --- D3.1 to D3.3: budgets that cannot be


@pytest.mark.fault("D3.1", "a budget with target_rank={target!r}, the layers start with rank 4")
@pytest.mark.parametrize("target", [5, 0, 0.001, float("nan"), None])
def test_a_target_above_the_start_is_refused(target, survived):
    model = with_adalora().model
    message = "must be a number in 0.*..4, one triplet in all and the rank at the start: lower it"
    survived(**refused(lambda: budget_of(model, target_rank=target), model, message))


@pytest.mark.fault("D3.2", "a budget with steps={steps!r}")
@pytest.mark.parametrize("steps", [None, 0, -5, 100.0, "100"])
def test_a_budget_without_its_steps_is_refused(steps, survived):
    model = with_adalora().model
    message = "steps=.* must be a whole number .*; give the steps that finetune gets"
    survived(**refused(lambda: budget_of(model, steps=steps), model, message))


@pytest.mark.fault("D3.3", "a budget of 8 steps with initial_steps={initial}, final_steps={final}")
@pytest.mark.parametrize(("initial", "final"), [(6, 2), (0, 8), (8, 0), (100, 100)])
def test_a_budget_that_leaves_no_step_to_prune_in_is_refused(initial, final, survived):
    model = with_adalora().model
    options = {"initial_steps": initial, "final_steps": final}
    message = "leave no step of 8 to prune in: lower one of them, or raise steps"
    survived(**refused(lambda: budget_of(model, **options), model, message))


# --- D3.4: nobody prunes


@pytest.mark.fault("D3.4", "finetune of AdaLoRA with {after_step} for after_step")
@pytest.mark.parametrize("after_step", ["None", "a function that prunes nothing"])
def test_training_without_a_budget_is_refused(after_step, machine, survived):
    base = with_adalora()
    chosen = None if after_step == "None" else (lambda model, step: None)
    message = "AdaLoRA without a budget keeps all its ranks: give after_step=Budget"
    survived(**refused(lambda: train(machine, base, after_step=chosen), base.model, message))


@pytest.mark.fault("D3.4", "finetune of peft's AdaLoRA without after_step")
def test_pefts_adalora_is_refused_without_its_call(machine, survived):
    base = fresh_tiny()
    settings = AdaLoraConfig(init_r=RANK, target_r=TARGET, total_step=STEPS, tfinal=2)
    base.model = get_peft_model(base.model, settings)
    message = "peft's AdaLoRA keeps all its ranks unless it is called after each step: give"
    survived(**refused(lambda: train(machine, base), base.model, message))


# --- D3.5: a budget of something else


@pytest.mark.fault("D3.5", "finetune with steps={steps}, the budget is made for 8")
@pytest.mark.parametrize("steps", [4, 9])
def test_a_budget_of_another_number_of_steps_is_refused(steps, machine, survived):
    base = with_adalora()
    message = "the budget is made for steps=8, the run has .: give both the same"
    survived(**refused(lambda: run(machine, base, steps=steps), base.model, message))


@pytest.mark.fault("D3.5", "finetune with the budget of another model")
def test_a_budget_of_another_model_is_refused(machine, survived):
    base, other = with_adalora(), with_adalora()
    message = "layers that are not those of this model: make it from the model that is trained"
    action = lambda: run(machine, base, lambda model: budget_of(other.model))  # noqa: E731
    survived(**refused(action, base.model, message))


# --- D3.6: runs that are broken off


def run_and_die(folder, at, machine):
    die_at("course_lib.adalora.keep_top", at)
    run(machine, folder=folder, save_every=1)


@pytest.mark.fault("D3.6", "killed with SIGKILL amid the prunings, at the {at}. of 5")
@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_run_killed_while_it_pruned_goes_on_to_the_same_ranks(at, machine, tmp_path, survived):
    process = PROCESSES.Process(target=run_and_die, args=(tmp_path / "run", at, machine))
    process.start()
    process.join()
    assert process.exitcode == -9
    base, lines = with_adalora(), []
    run(machine, base, folder=tmp_path / "run", save_every=1, say=lines.append)
    unbroken, _ = run(machine)
    assert lines == [f"going on from checkpoint-{at}"]
    survived(lines[0], [] if same_weights(base, unbroken) else ["the weights"])


@pytest.mark.fault("D3.6", "the checkpoint is of a run with another target rank")
def test_a_run_does_not_go_on_with_another_budget(machine, tmp_path, survived):
    options = {"folder": tmp_path / "run", "save_every": 4}
    run(machine, **options)
    base = with_adalora()
    action = lambda: run(  # noqa: E731
        machine, base, lambda model: budget_of(model, target_rank=1), **options
    )
    message = "is of another run .after_step"
    survived(**refused(action, base.model, message, CheckpointError))


# --- D3.7: files whose ranks do not fit


def edit_pattern(folder, change):
    settings = json.loads((folder / CONFIG).read_text())
    change(settings["rank_pattern"])
    (folder / CONFIG).write_text(json.dumps(settings))


def one_too_many(pattern):
    next(iter(pattern.values())).append(True)


def numbers(pattern):
    pattern[next(iter(pattern))] = [1, 0, 1, 1]


def another_rank(pattern):
    pattern[next(iter(pattern))] = [True, False, False, False]


PATTERNS = {
    "a layer with one triplet too many": (one_too_many, "another rank_pattern, expected 4 truth"),
    "numbers for truth values": (numbers, "another rank_pattern, expected 4 truth values a layer"),
    "another rank than the matrices": (another_rank, r"is \(4, 128\), expected \(1, 128\); load"),
}


@pytest.mark.fault("D3.7", "the rank_pattern has {damage}")
@pytest.mark.parametrize("damage", PATTERNS)
def test_ranks_that_do_not_fit_the_matrices_are_refused(damage, tmp_path, tiny, survived):
    save_adapter(with_adalora().model, tmp_path / "adapter")
    (tmp_path / "adapter" / SEAL).unlink()
    change, message = PATTERNS[damage]
    edit_pattern(tmp_path / "adapter", change)
    action = lambda: load_adapter(tiny.model, tmp_path / "adapter")  # noqa: E731
    survived(**refused(action, tiny.model, message))


@pytest.mark.fault("D3.7", "the file has no singular values of a layer")
def test_a_file_without_singular_values_is_refused(tmp_path, tiny, survived):
    save_adapter(with_adalora().model, tmp_path / "adapter")
    (tmp_path / "adapter" / SEAL).unlink()
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    del tensors[next(key for key in tensors if key.endswith("lora_E"))]
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    action = lambda: load_adapter(tiny.model, tmp_path / "adapter")  # noqa: E731
    survived(**refused(action, tiny.model, r"E of .* is missing, expected \(4, 1\)"))


# --- D3.8: what a base or a model already has


@pytest.mark.fault("D3.8", "merged_copy of AdaLoRA over a 4-bit base")
def test_it_is_not_merged_into_codes(machine, survived):
    base = models.load("tiny", machine, quantize="nf4", say=QUIET)
    with_adalora(base)
    action = lambda: merged_copy(base.model)  # noqa: E731
    survived(**refused(action, base.model, "is quantised, so its weight is no matrix"))


@pytest.mark.fault("D3.8", "add_adalora twice")
def test_it_is_not_added_twice(survived):
    model = with_adalora().model
    action = lambda: add_adalora(model, 2, 4, ["k_proj"])  # noqa: E731
    survived(**refused(action, model, "has an adapter already: load the base again"))
    assert len(adalora_layers(model)) == 2 * model.config.num_hidden_layers
