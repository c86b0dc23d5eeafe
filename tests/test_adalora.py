"""Tests of course_lib.adalora: nothing changes at the start, every step of the budget equals
peft's, and what would leave the ranks as they are is refused.
"""

import copy
import functools
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from course_lib import checkpoints, models
from course_lib.adalora import (
    BETA,
    PENALTY_WEIGHT,
    Budget,
    Schedule,
    SVDLinear,
    adalora_layers,
    add_adalora,
    keep_top,
    orthogonality_penalty,
    penalized_loss,
    remove_adalora,
    triplet_scores,
    update_importance,
)
from course_lib.adapter_files import load_adapter, save_adapter
from course_lib.batching import collate, encode_records
from course_lib.checkpoints import CheckpointError
from course_lib.lora import add_lora, merged_copy, remove_lora
from course_lib.objective import summed_loss
from course_lib.runtime import CourseError
from course_lib.surgery import count_parameters
from tests.fixtures.models import IDS, fresh_tiny, logits, small_gpt2
from tests.fixtures.runs import QUIET, RECORDS, same_weights, train

RANK, TARGET, ALPHA = 6, 3, 12
STEPS, INITIAL, FINAL = 12, 2, 4
BASES = {
    "bias": lambda d_in, d_out: nn.Linear(d_in, d_out),
    "no bias": lambda d_in, d_out: nn.Linear(d_in, d_out, bias=False),
    "Conv1D": lambda d_in, d_out: Conv1D(d_out, d_in),
}
MODELS = {"llama": lambda: fresh_tiny().model, "gpt2": small_gpt2}


def budget_of(model, **options):
    numbers = {"steps": STEPS, "initial_steps": INITIAL, "final_steps": FINAL}
    return Budget(model, **{"target_rank": TARGET} | numbers | options)


def peft_settings(**options):
    numbers = {"total_step": STEPS, "tinit": INITIAL, "tfinal": FINAL, "deltaT": 1}
    ranks = {"init_r": RANK, "target_r": TARGET, "lora_alpha": ALPHA}
    return AdaLoraConfig(**{"task_type": "CAUSAL_LM"} | numbers | ranks | options)


def adapted_by_both(kind="llama", **options):
    """The same adapter here and in peft, with singular values that are not zero; peft's layers."""
    ours = MODELS[kind]()
    add_adalora(ours, RANK, ALPHA, "all-linear")
    theirs = get_peft_model(
        MODELS[kind](),
        peft_settings(
            target_modules=list(adalora_layers(ours)), fan_in_fan_out=kind == "gpt2", **options
        ),
    )
    generator = torch.Generator().manual_seed(1)
    layers = {path: theirs.base_model.model.get_submodule(path) for path in adalora_layers(ours)}
    for path, layer in adalora_layers(ours).items():
        layer.singular.data = torch.randn(RANK, generator=generator)
        for name, weight in zip("AEB", (layer.Q, layer.singular[:, None], layer.P), strict=True):
            getattr(layers[path], f"lora_{name}")["default"].data = weight.detach().clone()
    return ours, theirs, layers


def fill(model, seed=0):
    """Give every singular value a random number, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adalora_layers(model).values():
        layer.singular.data = torch.randn(layer.rank, generator=generator)


def nonzero(model):
    return sum(int((layer.singular != 0).sum()) for layer in adalora_layers(model).values())


def trained_with_budget(machine, base=None, make=budget_of, targets=None, **options):
    base = base or fresh_tiny()
    if not adalora_layers(base.model):
        add_adalora(base.model, RANK, ALPHA, targets)
    budget = make(base.model)
    options = {"steps": STEPS, "learning_rate": 1e-2, "loss": penalized_loss} | options
    base, run = train(machine, base, after_step=budget, **options)
    return base, budget, run


# --- identity at the start


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_a_fresh_adapter_changes_no_bit(tiny, targets):
    before = logits(tiny.model)
    add_adalora(tiny.model, 8, 16, targets)
    assert torch.equal(logits(tiny.model), before)


def test_p_and_q_start_as_pefts_do_and_the_singular_values_at_zero():
    layer = SVDLinear(nn.Linear(400, 300), rank=100, alpha=1)
    theirs = get_peft_model(
        nn.Sequential(nn.Linear(400, 300)),
        AdaLoraConfig(init_r=100, target_r=50, total_step=1, target_modules=["0"]),
    ).base_model.model[0]
    pairs = ((layer.Q, theirs.lora_A["default"]), (layer.P, theirs.lora_B["default"]))
    for ours, peft in pairs:
        torch.testing.assert_close(ours.std(), peft.std(), rtol=0.02, atol=0)
    assert not layer.singular.any()
    assert not theirs.lora_E["default"].any()


# --- agreement with peft


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("seed", range(5))
def test_outputs_gradients_and_merged_weights_equal_pefts(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    d_in, d_out = torch.randint(3, 24, (2,), generator=generator).tolist()
    rank = torch.randint(1, min(d_in, d_out) + 1, (1,), generator=generator).item()
    torch.manual_seed(seed)
    base = BASES[kind](d_in, d_out)
    numbers = {"init_r": rank, "target_r": 1, "lora_alpha": 3, "total_step": 1}
    config = AdaLoraConfig(target_modules=["0"], fan_in_fan_out=kind == "Conv1D", **numbers)
    theirs = get_peft_model(nn.Sequential(copy.deepcopy(base)), config)
    peft = theirs.base_model.model[0]
    layer = SVDLinear(base, rank, alpha=3)
    layer.singular.data = torch.randn(rank, generator=generator)
    weights = (layer.Q, layer.singular, layer.P)
    named = [getattr(peft, f"lora_{name}")["default"] for name in "AEB"]
    for ours, other in zip(weights, named, strict=True):
        other.data = ours.detach().clone().view_as(other)
    x = torch.randn(2, 5, d_in, generator=generator)
    for model in (layer, theirs):
        model(x).square().mean().backward()
    torch.testing.assert_close(layer(x), theirs(x), atol=1e-5, rtol=1e-5)
    for ours, other in zip(weights, named, strict=True):
        torch.testing.assert_close(ours.grad.view_as(other), other.grad, atol=1e-5, rtol=1e-4)
    merged, merged_peft = merged_copy(nn.Sequential(layer))[0], theirs.merge_and_unload()[0]
    torch.testing.assert_close(merged.weight, merged_peft.weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_the_penalty_equals_what_peft_adds_to_the_loss(kind):
    ours, theirs, _ = adapted_by_both(kind)
    labels = {"input_ids": IDS, "labels": IDS}
    added = theirs(**labels).loss - theirs.base_model.model(**labels).loss
    penalty = orthogonality_penalty(adalora_layers(ours).values())
    torch.testing.assert_close(PENALTY_WEIGHT * penalty, added, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_budget_importance_and_mask_equal_pefts_after_every_step(seed, every):
    ours, theirs, layers = adapted_by_both(deltaT=every)
    budget = budget_of(ours, every=every)
    allocator = theirs.base_model.rankallocator
    generator = torch.Generator().manual_seed(seed)
    names = {"P": "lora_B", "singular": "lora_E", "Q": "lora_A"}
    for step in range(1, STEPS + 1):
        for path, layer in adalora_layers(ours).items():  # an optimizer's step, and gradients
            for name, other in names.items():
                weight, peft = getattr(layer, name), getattr(layers[path], other)["default"]
                change = torch.randn(weight.shape, generator=generator) / 10
                weight.grad = torch.randn(weight.shape, generator=generator)
                weight.data += change
                peft.data += change.view_as(peft)
                peft.grad = weight.grad.clone().view_as(peft)
        budget(ours, step)
        theirs.base_model.update_and_allocate(step)
        assert budget.schedule.budget(step) == allocator.budget_schedule(step)[0]
        for path, layer in adalora_layers(ours).items():
            peft = layers[path].lora_E["default"]
            assert torch.equal(layer.singular, peft[:, 0])
            for name, other in names.items() if budget.sensitivity else ():
                for kind, averages in (
                    (budget.sensitivity, allocator.exp_avg_ipt),
                    (budget.uncertainty, allocator.exp_avg_unc),
                ):
                    found = kind[f"{path}.{name}"]
                    expected = averages[f"{path}.{other}.default"].view_as(found)
                    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)
        if budget.schedule.prunes(step):
            assert nonzero(ours) == budget.schedule.budget(step)
    assert nonzero(ours) == TARGET * len(layers)


def test_training_with_peft_gives_the_same_ranks_and_almost_the_same_weights(machine):
    ours, theirs, layers = adapted_by_both()
    bases = []
    for model in (ours, theirs):
        base = fresh_tiny()
        base.model = model
        bases.append(base)

    def with_pefts_penalty(model, batch):
        tokens = (batch["labels"][:, 1:] != -100).sum()
        mean = model(**batch).loss  # with peft's own penalty, times its weight
        return mean * tokens

    trained_with_budget(machine, bases[0])
    train(
        machine,
        bases[1],
        steps=STEPS,
        learning_rate=1e-2,
        loss=with_pefts_penalty,
        after_step=lambda model, step: model.base_model.update_and_allocate(step),
    )
    for path, layer in adalora_layers(ours).items():
        peft = layers[path].lora_E["default"][:, 0]
        assert torch.equal(layer.singular == 0, peft == 0)
        torch.testing.assert_close(layer.singular, peft, atol=2e-3, rtol=0)


# --- the mathematical property


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_the_budget_falls_from_the_start_to_the_target_and_stays(data):
    target = data.draw(st.integers(1, 50))
    start = data.draw(st.integers(target, 100))
    steps = data.draw(st.integers(2, 60))
    final = data.draw(st.integers(0, steps - 1))
    initial = data.draw(st.integers(0, steps - final - 1))
    schedule = Schedule(start, target, steps, initial, final, every=1)
    budgets = [schedule.budget(step) for step in range(steps + 1)]
    assert budgets == sorted(budgets, reverse=True)
    assert set(budgets[: initial + 1]) == {start}
    assert set(budgets[schedule.last_pruning :]) == {target}


@given(st.integers(1, 6), st.integers(1, 6), st.data())
@settings(max_examples=50, deadline=None)
def test_exactly_the_budget_is_kept_and_nothing_kept_is_below_what_goes(layers, rank, data):
    values = st.floats(0, 1, width=32)
    count = layers * rank
    scores = torch.tensor(data.draw(st.lists(values, min_size=count, max_size=count)))
    budget = data.draw(st.integers(1, count))
    kept = keep_top(scores.view(layers, rank), budget).flatten()
    assert kept.sum() == budget
    if budget < count:
        assert scores[kept].min() >= scores[~kept].max()


def test_importance_is_what_the_papers_equations_say():
    generator = torch.Generator().manual_seed(0)
    history = [torch.randn(2, 3, 4, dtype=torch.float64, generator=generator) for _ in range(5)]
    sensitivity, uncertainty = torch.zeros(2, 3, 4, dtype=torch.float64).unbind()
    expected = torch.zeros(2, 3, 4, dtype=torch.float64)
    for weight, gradient in history:
        update_importance(sensitivity, uncertainty, weight, gradient)
        importance = (weight * gradient).abs()
        expected[0] = BETA * expected[0] + (1 - BETA) * importance
        expected[1] = BETA * expected[1] + (1 - BETA) * (importance - expected[0]).abs()
    torch.testing.assert_close(torch.stack([sensitivity, uncertainty]), expected)


def test_a_triplets_score_is_a_value_and_two_means():
    P, singular, Q = torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([0.5, 0.25]), torch.eye(2)
    assert triplet_scores(P, singular, Q).tolist() == [0.5 + 2 + 0.5, 0.25 + 4 + 0.5]


def test_gradients_equal_finite_differences_in_float64():
    torch.manual_seed(0)
    layer = SVDLinear(nn.Linear(5, 4), rank=3, alpha=2).double()
    layer.singular.data = torch.randn(3, dtype=torch.float64)
    names = ("P", "singular", "Q")
    weights = tuple(getattr(layer, name).detach().requires_grad_(True) for name in names)
    x = torch.randn(2, 5, dtype=torch.float64)

    def output_and_penalty(*weights):
        values = dict(zip(names, weights, strict=True))
        output = torch.func.functional_call(layer, values, (x,))
        parts = copy.copy(layer)
        parts._parameters = values
        return output, orthogonality_penalty([parts])

    assert torch.autograd.gradcheck(output_and_penalty, weights)


def test_the_penaltys_gradient_is_the_one_worked_out_by_hand():
    """d |P^T P - I| / dP = 2 P (P^T P - I) / |P^T P - I|, and half of it of each of two."""
    torch.manual_seed(0)
    layer = SVDLinear(nn.Linear(5, 4), rank=3, alpha=2).double()
    orthogonality_penalty([layer]).backward()
    eye = torch.eye(3, dtype=torch.float64)
    with torch.no_grad():
        for factor, gradient in ((layer.P, layer.P.grad), (layer.Q.T, layer.Q.grad.T)):
            residual = factor.T @ factor - eye
            expected = factor @ residual / torch.linalg.matrix_norm(residual)
            torch.testing.assert_close(gradient, expected)


def test_orthogonal_factors_have_no_penalty_and_a_gradient_that_is_finite():
    layer = SVDLinear(nn.Linear(6, 5), rank=3, alpha=2)
    nn.init.orthogonal_(layer.P)
    nn.init.orthogonal_(layer.Q)
    assert orthogonality_penalty([layer]) < 1e-5
    layer.P.data, layer.Q.data = torch.eye(5)[:, :3], torch.eye(6)[:3]
    penalty = orthogonality_penalty([layer])
    penalty.backward()
    assert penalty == 0
    assert not layer.P.grad.any()


def test_the_loss_is_the_usual_one_and_the_penalty_once_a_token(tiny):
    add_adalora(tiny.model, RANK, ALPHA)
    batch = collate(encode_records(RECORDS[:3], tiny.tokenizer, 1000).examples, 0)
    tokens = (batch["labels"][:, 1:] != -100).sum()
    penalty = orthogonality_penalty(adalora_layers(tiny.model).values())
    for weight in (0.1, 0.5):
        found = penalized_loss(tiny.model, batch, weight=weight)
        torch.testing.assert_close(
            found, summed_loss(tiny.model, batch) + weight * tokens * penalty
        )


def test_the_scale_is_that_of_the_start_also_after_pruning():
    """As in the authors' layer: alpha over the number of triplets it starts with."""
    layer = SVDLinear(nn.Linear(8, 8, bias=False), rank=4, alpha=8)
    layer.singular.data = torch.tensor([1.0, 0.0, 2.0, 0.0])
    layer.pruned.copy_(layer.singular == 0)
    assert layer.scale == 8 / 4
    expected = 2 * (layer.P[:, [0, 2]] * torch.tensor([1.0, 2.0])) @ layer.Q[[0, 2]]
    torch.testing.assert_close(layer.delta(), expected)


def test_after_training_as_many_triplets_are_left_as_the_target_says(machine):
    base, budget, run = trained_with_budget(machine)
    layers = adalora_layers(base.model)
    assert nonzero(base.model) == TARGET * len(layers) == sum(budget.ranks.values())
    found = [sum(ranks) for ranks in budget.history]
    assert found == [budget.schedule.budget(step) for step in range(1, STEPS + 1)]
    assert len(set(budget.ranks.values())) > 1
    assert run.losses[-1] < run.losses[0]


def test_the_penalty_makes_the_factors_orthogonal(machine):
    residual = {}
    for weight in (0.0, 0.5):
        base, _, _ = trained_with_budget(
            machine, loss=functools.partial(penalized_loss, weight=weight)
        )
        residual[weight] = orthogonality_penalty(adalora_layers(base.model).values()).item()
    assert residual[0.5] < 0.9 * residual[0.0]


# --- what stays untouched


def test_only_the_three_factors_train_and_the_global_generator_stays(machine):
    base = fresh_tiny()
    state = torch.get_rng_state()
    before = {name: weight.clone() for name, weight in base.model.named_parameters()}
    add_adalora(base.model, RANK, ALPHA)
    assert torch.equal(torch.get_rng_state(), state)
    trained = [name for name, weight in base.model.named_parameters() if weight.requires_grad]
    assert {name.rpartition(".")[2] for name in trained} == {"P", "singular", "Q"}
    expected = sum(RANK * (d_in + d_out + 1) for d_out, d_in in 8 * [(128, 128)])
    assert count_parameters(base.model).trained == expected
    trained_with_budget(machine, base)
    now = dict(base.model.named_parameters())
    for name, weight in before.items():
        own = name if name in now else name.replace(".weight", ".base.weight")
        assert torch.equal(now[own], weight)


def test_the_start_is_drawn_from_the_seed_alone():
    first, again, other = (fresh_tiny().model for _ in range(3))
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        add_adalora(model, RANK, ALPHA, seed=seed)
    pairs = zip(*(adalora_layers(model).values() for model in (first, again, other)), strict=True)
    for one, same, another in pairs:
        assert torch.equal(one.P, same.P)
        assert torch.equal(one.Q, same.Q)
        assert not torch.equal(one.Q, another.Q)


def test_removed_it_leaves_the_base_as_it_was(tiny):
    before, names = logits(tiny.model), [name for name, _ in tiny.model.named_parameters()]
    for _ in range(2):
        remove_adalora(tiny.model)
        add_adalora(tiny.model, RANK, ALPHA)
        fill(tiny.model)
    assert not torch.equal(logits(tiny.model), before)
    remove_adalora(tiny.model)
    assert torch.equal(logits(tiny.model), before)
    assert [name for name, _ in tiny.model.named_parameters()] == names
    assert all(weight.requires_grad for weight in tiny.model.parameters())


def test_the_merged_copy_computes_the_same_and_the_model_stays(tiny):
    add_adalora(tiny.model, RANK, ALPHA)
    fill(tiny.model)
    before = logits(tiny.model)
    merged = merged_copy(tiny.model)
    torch.testing.assert_close(logits(merged), before, atol=1e-4, rtol=0)
    assert not adalora_layers(merged)
    assert torch.equal(logits(tiny.model), before)


# --- files


@pytest.mark.parametrize("kind", MODELS)
def test_peft_reads_what_is_saved_here_with_its_ranks(kind, tmp_path):
    model, _, _ = adapted_by_both(kind)
    for number, layer in enumerate(adalora_layers(model).values()):
        layer.pruned[: number % (RANK + 1)] = True  # from none to all
        layer.singular.data.masked_fill_(layer.pruned, 0)
    save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(MODELS[kind](), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-4, rtol=0)
    for path, layer in adalora_layers(model).items():
        peft = theirs.base_model.model.get_submodule(path).lora_E["default"]
        assert len(peft) == int(layer.live.sum())
    again = MODELS[kind]()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    save_adapter(again, tmp_path / "again")
    files = ("adapter_config.json", "adapter_model.safetensors")
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (
            tmp_path / "adapter" / name
        ).read_bytes()


@pytest.mark.parametrize("kind", MODELS)
def test_what_peft_trained_and_saved_is_read_here_with_its_ranks(kind, tmp_path):
    settings = peft_settings(target_modules="all-linear", fan_in_fan_out=kind == "gpt2")
    theirs = get_peft_model(MODELS[kind](), settings)
    weights = [weight for weight in theirs.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    for step in range(1, STEPS + 1):
        theirs(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    theirs.eval().save_pretrained(tmp_path)
    model = MODELS[kind]()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-4, rtol=0)
    layers = adalora_layers(model)
    assert sum(int(layer.live.sum()) for layer in layers.values()) == TARGET * len(layers)


def test_an_adapter_that_was_not_pruned_yet_is_saved_whole(tmp_path, tiny):
    add_adalora(tiny.model, RANK, ALPHA)  # its singular values are zero, and not pruned
    save_adapter(tiny.model, tmp_path / "adapter")
    again = fresh_tiny().model
    load_adapter(again, tmp_path / "adapter")
    for path, layer in adalora_layers(again).items():
        assert torch.equal(layer.P, adalora_layers(tiny.model)[path].P)
        assert layer.live.all()
        assert not layer.P.requires_grad


# --- a run that is broken off


@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_has_the_ranks_and_the_weights_of_the_unbroken_one(
    every, machine, tmp_path, monkeypatch
):
    """Broken off before the first pruning, amid the prunings, before and after the last."""
    monkeypatch.setattr(checkpoints, "KEPT", STEPS)
    make = functools.partial(budget_of, every=every)
    options = {"make": make, "folder": tmp_path / "run", "save_every": 1}
    unbroken, whole, expected = trained_with_budget(machine, **options)
    for broken_off in (10, 8, 7, 5, 1):
        for step in range(broken_off + 1, STEPS + 1):  # as if the process had died before it
            shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
        resumed, budget, run = trained_with_budget(machine, **options)
        assert run.resumed_at == broken_off
        assert run.losses == expected.losses
        assert budget.ranks == whole.ranks
        assert same_weights(resumed, unbroken)
        assert nonzero(resumed.model) == TARGET * len(budget.layers)


@pytest.mark.parametrize(
    "other",
    [{"target_rank": 2}, {"final_steps": 5}, {"initial_steps": 3}, {"every": 2}],
    ids=lambda other: next(iter(other)),
)
def test_a_run_with_another_budget_does_not_go_on_from_a_checkpoint(other, machine, tmp_path):
    options = {"folder": tmp_path / "run", "save_every": 6}
    trained_with_budget(machine, **options)
    base = fresh_tiny()
    with pytest.raises(CheckpointError, match="is of another run .after_step"):
        trained_with_budget(machine, base, make=functools.partial(budget_of, **other), **options)
    assert nonzero(base.model) == 0


def test_nor_does_a_run_with_another_scale(machine, tmp_path):
    options = {"folder": tmp_path / "run", "save_every": 6}
    trained_with_budget(machine, **options)
    base = fresh_tiny()
    add_adalora(base.model, RANK, 2 * ALPHA)
    with pytest.raises(CheckpointError, match="is of another run .trained weights"):
        trained_with_budget(machine, base, **options)


def test_a_budget_that_is_used_again_begins_anew(machine):
    base, budget, _ = trained_with_budget(machine)
    trained_with_budget(machine, base, make=lambda model: budget)
    found = [sum(ranks) for ranks in budget.history]
    assert found[:STEPS] == found[STEPS:]


# --- hostile input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_rank": 7},
            "target_rank=7 must be a number in 0.*..6, one triplet in all and the rank at",
        ),
        ({"target_rank": 0}, "target_rank=0 .*: lower it, or give add_adalora a higher rank"),
        ({"steps": None}, "steps=None must be a whole number .*; give the steps that finetune"),
        ({"steps": 0}, "steps=0 must be a whole number"),
        ({"every": 0}, "every=0 must be a whole number of optimizer steps, at least 1"),
        ({"final_steps": -1}, "final_steps=-1 must be a whole number"),
        ({"final_steps": 10}, "initial_steps=2 and final_steps=10 leave no step of 12 to prune in"),
        ({"initial_steps": 8}, "leave no step of 12 to prune in: lower one of them, or raise"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(options, message, tiny):
    add_adalora(tiny.model, RANK, ALPHA)
    with pytest.raises(CourseError, match=message):
        budget_of(tiny.model, **options)


def test_a_target_that_is_the_start_prunes_nothing(machine):
    base, budget, _ = trained_with_budget(
        machine, make=functools.partial(budget_of, target_rank=RANK)
    )
    assert nonzero(base.model) == RANK * len(budget.layers)


def test_a_target_below_one_leaves_fewer_triplets_than_layers(machine):
    base, budget, _ = trained_with_budget(
        machine, make=functools.partial(budget_of, target_rank=0.25)
    )
    assert nonzero(base.model) == len(budget.layers) // 4
    assert budget_of(base.model, target_rank=4.1).schedule.target == 33  # of 8 layers: 32.8


def test_without_its_budget_training_is_refused_before_the_first_step(machine):
    base = fresh_tiny()
    add_adalora(base.model, RANK, ALPHA)
    for after_step in (None, lambda model, step: None):
        with pytest.raises(CourseError, match="keeps all its ranks: give after_step=Budget"):
            train(machine, base, loss=penalized_loss, after_step=after_step)
    assert nonzero(base.model) == 0


def test_pefts_is_refused_as_well(machine):
    base = fresh_tiny()
    base.model = get_peft_model(base.model, peft_settings())
    with pytest.raises(CourseError, match="peft's AdaLoRA keeps .*: give after_step=lambda"):
        train(machine, base)


def test_a_budget_of_other_steps_or_of_another_model_is_refused(machine):
    base, other = fresh_tiny(), fresh_tiny()
    for each in (base, other):
        add_adalora(each.model, RANK, ALPHA)
    with pytest.raises(CourseError, match="is made for steps=12, the run has 5: give both"):
        train(machine, base, steps=5, after_step=budget_of(base.model))
    with pytest.raises(CourseError, match="not those of this model: make it from the model that"):
        train(machine, base, steps=STEPS, after_step=budget_of(other.model))


def test_a_frozen_factor_is_refused(machine):
    base = fresh_tiny()
    add_adalora(base.model, RANK, ALPHA)
    next(iter(adalora_layers(base.model).values())).P.requires_grad_(False)
    with pytest.raises(CourseError, match="q_proj.P is frozen, and its importance is read"):
        train(machine, base, steps=STEPS, after_step=budget_of(base.model))


@pytest.mark.parametrize("rank", [0, 129, 2.0, None])
def test_a_rank_that_cannot_be_is_refused_and_nothing_freezes(rank, tiny):
    with pytest.raises(CourseError, match="rank=.* must be a whole number in 1..128"):
        add_adalora(tiny.model, rank, ALPHA)
    assert all(weight.requires_grad for weight in tiny.model.parameters())


def test_a_second_adapter_is_refused(tiny):
    for add in (add_lora, add_adalora):
        add(tiny.model, 2, 4, ["q_proj"])
        with pytest.raises(CourseError, match="has an adapter .*load the base again"):
            add_adalora(tiny.model, RANK, ALPHA, ["v_proj"])
        remove_lora(tiny.model)


def test_a_model_without_the_layers_has_no_budget(tiny):
    with pytest.raises(CourseError, match="no layers of AdaLoRA: add_adalora adds them"):
        budget_of(tiny.model)


def test_over_a_4_bit_base_it_trains_and_is_not_merged(machine):
    base = models.load("tiny", machine, quantize="nf4", say=QUIET)
    add_adalora(base.model, RANK, ALPHA)
    codes = [weight.clone() for weight in base.model.parameters() if not weight.requires_grad]
    _, budget, run = trained_with_budget(machine, base)
    assert nonzero(base.model) == TARGET * len(budget.layers)
    assert run.losses[-1] < run.losses[0]
    frozen = [weight for weight in base.model.parameters() if not weight.requires_grad]
    assert all(torch.equal(one, other) for one, other in zip(codes, frozen, strict=True))
    with pytest.raises(CourseError, match="is quantised"):
        merged_copy(base.model)


def test_a_step_that_fp16_skips_at_the_last_pruning_does_not_lose_it(tiny):
    add_adalora(tiny.model, RANK, ALPHA)
    budget = budget_of(tiny.model)
    generator = torch.Generator().manual_seed(0)
    for step in (1, 2, 3, 9, 12):  # 8, the last pruning, is not among them
        for layer in budget.layers.values():
            for weight in layer.parameters(recurse=False):
                weight.grad = torch.randn(weight.shape, generator=generator)
                weight.data += weight.grad / 10
        budget(tiny.model, step)
    assert nonzero(tiny.model) == TARGET * len(budget.layers)
