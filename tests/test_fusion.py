"""Tests of course_lib.fusion: each job of a fused batch gets what it would get alone."""

import random

import pytest
import torch
from torch import nn

from course_lib import lora, surgery
from course_lib.batching import IGNORED, Example, collate
from course_lib.fusion import fused_losses, padded_tokens, schedule, train_fused
from course_lib.lora import add_lora, lora_layers, use_adapters
from course_lib.objective import supervised_loss
from course_lib.runtime import CourseError
from course_lib.training import TrainingError
from tests.fixtures.jobs import BATCHES, JOBS, PAD, example, with_jobs
from tests.fixtures.models import IDS, fill, logits, small_gpt2


def gradients(model):
    return {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def test_fused_losses_and_gradients_equal_those_of_each_job_alone():
    model = with_jobs()
    fused = fused_losses(model, BATCHES, PAD)
    sum(fused.values()).backward()
    found = gradients(model)
    model.zero_grad()
    for job, batch in BATCHES.items():
        use_adapters(model, job)
        loss = supervised_loss(model, collate(batch, PAD))
        loss.backward()
        torch.testing.assert_close(fused[job], loss, atol=1e-5, rtol=0)
    expected = gradients(model)
    assert (
        found.keys()
        == expected.keys()
        == {name for name, _ in model.named_parameters() if ".adapters." in name}
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_fusion_works_for_gpt2_too():
    model = small_gpt2()
    for seed, job in enumerate(("one", "two")):
        add_lora(model, 2, 4, name=job, seed=seed)
        fill(model, seed, job)
    batches = {"one": [example(5, 1)], "two": [example(8, 2)]}
    fused = fused_losses(model, batches, PAD)
    for job, batch in batches.items():
        use_adapters(model, job)
        torch.testing.assert_close(
            fused[job], supervised_loss(model, collate(batch, PAD)), atol=1e-5, rtol=0
        )


def test_the_base_takes_the_rows_of_all_jobs_in_one_product():
    model = with_jobs()
    seen = []
    for layer in lora_layers(model).values():
        layer.base.register_forward_hook(lambda base, inputs, output: seen.append(len(inputs[0])))
    fused_losses(model, BATCHES, PAD)
    assert set(seen) == {7}
    assert len(seen) == len(lora_layers(model))


def test_training_together_equals_training_one_after_the_other():
    model = with_jobs()
    generator = random.Random(0)
    jobs = {
        job: [[example(generator.randrange(3, 12), generator.random())] for _ in range(3 + n)]
        for n, job in enumerate(JOBS)
    }
    steps = schedule(jobs, budget=36)
    assert {len(step) for step in steps} > {1}  # jobs do share batches, and not always all of them
    losses = train_fused(model, steps, learning_rate=2e-3, pad_id=PAD)
    apart = with_jobs()
    for job, batches in jobs.items():
        alone = train_fused(
            apart, [{job: batch} for batch in batches], learning_rate=2e-3, pad_id=PAD
        )
        assert losses[job][0] == pytest.approx(alone[job][0], rel=1e-5)
        # each step multiplies the rounding
        assert losses[job] == pytest.approx(alone[job], rel=1e-3)
    for job in JOBS:
        use_adapters(model, job)
        use_adapters(apart, job)
        torch.testing.assert_close(logits(model), logits(apart), atol=1e-2, rtol=0)


def test_training_alone_is_plain_adamw():
    batches = [[example(6, seed), example(8, seed + 10)] for seed in range(3)]
    model, plain = with_jobs(), with_jobs()
    losses = train_fused(
        model, [{"two": batch} for batch in batches], learning_rate=2e-3, pad_id=PAD
    )
    use_adapters(plain, "two")
    optimizer = torch.optim.AdamW(
        [w for name, w in plain.named_parameters() if ".two." in name], lr=2e-3, weight_decay=0
    )
    expected = []
    for batch in batches:
        loss = supervised_loss(plain, collate(batch, PAD))
        expected.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == {"two": pytest.approx(expected, rel=1e-5)}
    assert losses["two"][-1] != losses["two"][0]


def test_after_a_fused_batch_the_model_computes_as_before():
    model = with_jobs()
    use_adapters(model, "two")
    before = logits(model)
    fused_losses(model, BATCHES, PAD)
    assert torch.equal(logits(model), before)
    with pytest.raises(RuntimeError, match="stop"), lora.fused_rows(model, {"one": 2}):
        raise RuntimeError("stop")
    assert torch.equal(logits(model), before)


def test_gradients_of_before_do_not_reach_the_weights():
    model, fresh = with_jobs(), with_jobs()
    sum(fused_losses(model, BATCHES, PAD).values()).backward()
    for trained in (model, fresh):
        train_fused(trained, [BATCHES], learning_rate=2e-3, pad_id=PAD)
    assert all(
        torch.equal(weight, expected)
        for weight, expected in zip(model.parameters(), fresh.parameters(), strict=True)
    )
    assert not gradients(model)


def test_a_fused_block_in_another_gives_the_outer_one_back():
    model = with_jobs()
    with lora.fused_rows(model, {"two": 1, "one": 1}):
        outer = logits(model)
        with lora.fused_rows(model, {"four": 2}):
            assert not torch.equal(logits(model), outer)
        assert torch.equal(logits(model), outer)


def test_one_batch_can_be_answered_by_several_adapters():
    model = with_jobs()
    with lora.fused_rows(model, {"two": 1, "one": 1}):
        together = logits(model)
    for row, job in enumerate(("two", "one")):
        use_adapters(model, job)
        torch.testing.assert_close(together[row], logits(model)[row], atol=1e-4, rtol=0)


# --- the schedule


@pytest.mark.parametrize("seed", range(20))
def test_a_schedule_is_complete_ordered_within_budget_and_fair(seed):
    generator = random.Random(seed)
    jobs = {
        f"job{number}": [
            [example(generator.randrange(2, 20), 0) for _ in range(generator.randrange(1, 4))]
            for _ in range(generator.randrange(0, 9))
        ]
        for number in range(generator.randrange(1, 6))
    }
    budget = 60 + generator.randrange(60)
    steps = schedule(jobs, budget)
    served = {job: [step[job] for step in steps if job in step] for job in jobs}
    assert served == jobs  # every batch once, in order
    assert all(step and padded_tokens(step) <= budget for step in steps)
    for job, batches in jobs.items():
        turns = [number for number, step in enumerate(steps) if job in step]
        assert len(turns) == len(batches)
        assert all(
            later - earlier <= len(jobs)
            for earlier, later in zip([-1, *turns], turns, strict=False)
        )


def test_jobs_that_fit_together_are_always_trained_together():
    jobs = {job: [[example(5, 0)]] * 6 for job in JOBS}
    assert schedule(jobs, budget=20) == [{job: jobs[job][0] for job in JOBS}] * 6


@pytest.mark.parametrize(
    ("batch", "found"), [([example(9, 0), example(2, 0)], "18 tokens"), ([], "0 tokens")]
)
def test_a_batch_that_cannot_be_scheduled_is_named(batch, found):
    with pytest.raises(
        CourseError,
        match=f"batch 2 of job 'long' has {found} with padding, expected 1 to 17: raise budget",
    ):
        schedule({"short": [[example(2, 0)]], "long": [[example(3, 0)], batch]}, budget=17)


# --- hostile input; more of it is in tests/faults


def test_a_job_without_supervised_tokens_is_named():
    masked = Example([1, 2, 3], [1, IGNORED, IGNORED])  # the first position is nobody's next token
    with pytest.raises(TrainingError, match="job 'two' has no supervised token"):
        fused_losses(with_jobs(), {"one": [example(4, 0)], "two": [masked]}, PAD)
    with pytest.raises(TrainingError, match="job 'one' has no supervised token"):
        fused_losses(with_jobs(), {"one": [Example([], [])]}, PAD)
    with pytest.raises(TrainingError, match="no examples"):
        fused_losses(with_jobs(), {}, PAD)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    model = with_jobs()
    next(iter(lora_layers(model, "two").values())).adapters["two"].B.data[0, 0] = torch.nan
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(TrainingError, match="the loss of job 'two' is nan"):
        train_fused(model, [BATCHES], learning_rate=1e-3, pad_id=PAD)
    assert all(
        torch.equal(weight, before[name])
        for name, weight in model.named_parameters()
        if ".one." in name
    )


@pytest.mark.parametrize("learning_rate", [0, -1e-3, "1e-3", float("nan")])
def test_a_learning_rate_must_be_above_0(learning_rate):
    with pytest.raises(TrainingError, match="learning_rate=.* above 0"):
        train_fused(with_jobs(), [BATCHES], learning_rate, PAD)


def test_a_model_that_mixes_rows_is_refused():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x.flatten(0, 1))

    model = Flat()
    add_lora(model, 2, 4, ["fc"])
    with (
        lora.fused_rows(model, {"default": 2}),
        pytest.raises(CourseError, match="got 6 rows of a batch of 2"),
    ):
        model(torch.ones(2, 3, 4))
    assert surgery.count_parameters(model).trained == 16
    assert model(torch.ones(*IDS.shape, 4)).shape == (10, 4)


@pytest.mark.parametrize("number", [-1, 2.0, "2", None, True])
def test_a_number_of_rows_is_a_whole_number(number):
    with (
        pytest.raises(CourseError, match="adapter 'one' has .* rows, expected a whole number"),
        lora.fused_rows(with_jobs(), {"one": number}),
    ):
        pass


def test_weights_of_half_precision_are_not_trained():
    with pytest.raises(TrainingError, match="trained weights are torch.float16, expected float32"):
        train_fused(with_jobs().half(), [BATCHES], 1e-3, PAD)
