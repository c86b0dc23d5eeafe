"""Tests of course_lib.training: the library's loss, whole checkpoints, and stops with advice."""

import dataclasses
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch

from course_lib import models, training
from course_lib.alpaca import Record
from course_lib.batching import IGNORED, Example, collate, encode, encode_prompt, encode_records
from course_lib.evaluation import generate
from course_lib.runtime import GIB, CourseError, Gpu, decide
from course_lib.training import TrainingError, finetune, supervised_loss

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
QUIET = lambda line: None  # noqa: E731
RECORDS = [Record(f"Say the number {n}.", f"It is {n * 7}.") for n in range(20)]


def fresh_tiny():
    return models.load("tiny", decide(gpu=None, override=None, cores=2, memory_bytes=8 * GIB))


def train(machine, base=None, records=RECORDS, **options):
    base = base or fresh_tiny()
    examples = encode_records(records, base.tokenizer, max_tokens=1000).examples
    options = {"steps": 6, "batch_size": 4, "learning_rate": 1e-3, "say": QUIET, **options}
    return base, finetune(base, examples, machine, **options)


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def took_the_same_steps(one, other):
    """Up to rounding, compared as whole updates: where a gradient is almost zero, Adam turns its rounding into a step."""
    before, one, other = (
        torch.cat([weight.detach().flatten() for weight in base.model.parameters()]) for base in (fresh_tiny(), one, other)
    )
    return (one - other).norm() < 1e-3 * (other - before).norm()


def library_loss_and_gradients(base, batch):
    base.model.zero_grad()
    loss = base.model(**batch).loss
    loss.backward()
    return loss.detach(), [weight.grad.clone() for weight in base.model.parameters()]


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_loss_and_gradients_equal_the_librarys(request, name, records):
    base = request.getfixturevalue(name)
    batch = collate([encode(record, base.tokenizer) for record in records], base.tokenizer.pad_token_id)
    expected_loss, expected_gradients = library_loss_and_gradients(base, batch)
    base.model.zero_grad()
    loss = supervised_loss(base.model, batch)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected_loss, atol=1e-6, rtol=0)
    scale = max(gradient.abs().max() for gradient in expected_gradients)
    for weight, expected in zip(base.model.parameters(), expected_gradients, strict=True):
        torch.testing.assert_close(weight.grad / scale, expected / scale, atol=1e-6, rtol=0)
    base.model.zero_grad()


def test_loss_equals_cross_entropy_written_out(tiny):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 1536, (3, 17), generator=generator)
    labels = torch.where(torch.rand(3, 17, generator=generator) < 0.5, ids, IGNORED)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    log_p = tiny.model(input_ids=ids).logits.log_softmax(-1)
    terms = [-log_p[n, t - 1, labels[n, t]] for n in range(3) for t in range(1, 17) if labels[n, t] != IGNORED]
    torch.testing.assert_close(supervised_loss(tiny.model, batch), torch.stack(terms).mean())
    torch.testing.assert_close(supervised_loss(tiny.model, batch, reduction="sum"), torch.stack(terms).sum())


def test_the_loss_leaves_no_hook_behind(tiny, records):
    batch = collate([encode(records[0], tiny.tokenizer)], tiny.tokenizer.pad_token_id)
    supervised_loss(tiny.model, batch)
    assert tiny.model(input_ids=batch["input_ids"]).logits.shape == (*batch["input_ids"].shape, 1536)


def test_a_batch_without_supervised_tokens_is_refused(tiny):
    batch = collate([Example([5, 6, 7], [IGNORED] * 3)], pad_id=2)
    with pytest.raises(TrainingError, match="no supervised token"):
        supervised_loss(tiny.model, batch)


def test_a_batch_overfits_and_is_reproduced(machine, tiny):
    record = Record("Say it.", 'Stone, "paper", scissors!')
    run = finetune(tiny, [encode(record, tiny.tokenizer)] * 4, machine, steps=60, batch_size=4, learning_rate=3e-3, say=QUIET)
    assert run.losses[-1] < 0.1 < run.losses[0]
    assert generate(tiny, [encode_prompt(record, tiny.tokenizer)], 60) == [record.output]


def test_accumulation_takes_the_same_step_as_a_large_batch(machine):
    large, run_large = train(machine, steps=2, batch_size=4)
    small, run_small = train(machine, steps=2, batch_size=1, accumulate=4)
    assert run_small.losses == pytest.approx(run_large.losses, abs=1e-4)
    assert took_the_same_steps(small, large)


def test_a_run_reports_what_it_did(machine):
    base, run = train(machine)
    example = encode(RECORDS[0], base.tokenizer)
    assert len(run.losses) == 6
    assert run.tokens >= 24 * (len(example) - 1)
    assert 0 < run.supervised_tokens < run.tokens
    assert run.tokens_per_second == pytest.approx(run.tokens / run.seconds)
    assert str(run).startswith("6 steps, ")


def test_the_seed_decides_everything(machine):
    assert same_weights(train(machine, seed=1)[0], train(machine, seed=1)[0])
    assert not same_weights(train(machine, seed=1)[0], train(machine, seed=2)[0])


def test_frozen_weights_stay(machine, tiny):
    tiny.model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: weight.clone() for name, weight in tiny.model.named_parameters()}
    train(machine, base=tiny)
    changed = {name for name, weight in tiny.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name, weight in tiny.model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("group_by_length", [False, True])
def test_every_epoch_shows_every_example_once(group_by_length):
    order = training.training_order(list(range(1, 11)), steps=5, examples_per_step=4, group_by_length=group_by_length, seed=0)
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]


# --- checkpoints


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
    assert kept == ["checkpoint-1", "checkpoint-100", "checkpoint-4", "checkpoint-6", "checkpoint-7", "checkpoint-best"]


# --- what stops a run, and what it says


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 must be a whole number, at least 1"),
        ({"steps": 1.5}, "steps=1.5 must be a whole number"),
        ({"batch_size": -1}, "batch_size=-1 must be a whole number"),
        ({"folder": "somewhere", "save_every": 0}, "save_every=0 must be a whole number"),
        ({"learning_rate": 0}, "learning_rate=0 must be a number above 0"),
        ({"learning_rate": -1e-4}, "learning_rate=-0.0001 must be a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be a number above 0"),
        ({"learning_rate": "1e-4"}, "learning_rate='1e-4' must be a number above 0"),
        ({"warmup_steps": 6}, r"warmup_steps=6 must lie in 0\.\.5, below steps=6"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0"),
        ({"folder": "somewhere"}, "folder and save_every belong together"),
        ({"save_every": 2}, "folder and save_every belong together"),
    ],
)
def test_settings_that_cannot_work_are_refused(machine, options, message):
    with pytest.raises(TrainingError, match=message):
        train(machine, **options)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "no examples"),
        (None, "examples is a NoneType, expected a list"),
        ([Example([5, 2], [IGNORED])], "example 1 has 2 ids and 1 labels"),
        ([Example([5, 2], [IGNORED, 2]), Example([5, 2], [IGNORED] * 2)], "example 2 has no supervised token"),
        ([Example([5] * 3000, [5] * 3000)], "example 1 has 3000 tokens, the model takes 2048"),
        ([Example([1536, 2], [IGNORED, 2])], "token id 1536 is beyond the model's 1536 embeddings"),
        ([Example([-1, 2], [IGNORED, 2])], "token id -1 is beyond"),
        ([Example([5, 2], [IGNORED, 49_000])], "token id 49000 is beyond"),
    ],
)
def test_examples_that_cannot_be_trained_on_are_refused(machine, tiny, examples, message):
    with pytest.raises(CourseError, match=message):
        finetune(tiny, examples, machine, steps=1, batch_size=1, learning_rate=1e-3)


def test_a_model_with_nothing_to_train_is_refused(machine, tiny):
    tiny.model.requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing would be trained"):
        train(machine, base=tiny)


def test_half_precision_weights_are_refused_with_the_remedy(machine, tiny):
    tiny.model.half()
    with pytest.raises(TrainingError, match=r"trained weights are torch.float16, expected float32: load the model with dtype"):
        train(machine, base=tiny)


def test_autocast_is_taken_off_the_model_after_training(machine, tiny):
    half = dataclasses.replace(machine, dtype="bfloat16")
    forward = tiny.model.forward
    train(half, base=tiny, steps=1)
    assert tiny.model.forward == forward
    assert tiny.model(torch.tensor([[5, 6]])).logits.dtype == torch.float32


def test_two_processes_take_the_same_steps_as_one(machine, tmp_path):
    code = """
        import torch
        from course_lib import runtime
        from tests.test_training import train
        machine = runtime.decide(None, None, 2, 8 * runtime.GIB)
        base, run = train(machine, batch_size=2, steps=3)
        if torch.distributed.get_rank() == 0:
            torch.save([weight.detach() for weight in base.model.parameters()], {target!r})
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code).format(target=str(tmp_path / "weights.pt")))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    one, _ = train(machine, batch_size=4, steps=3)
    for weight, other in zip(one.model.parameters(), torch.load(tmp_path / "weights.pt"), strict=True):
        torch.testing.assert_close(weight, other, atol=2e-4, rtol=0)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), (True, False)), ((8, 0), (False, True))])
def test_the_dtype_of_the_machine_reaches_the_trainer(capability, expected, monkeypatch, tiny):
    machine = decide(Gpu("Fake", capability, 15 * GIB), None, cores=2, memory_bytes=8 * GIB)
    seen = {}

    class Stop(Exception):
        pass

    def arguments(**options):
        seen.update(options)
        raise Stop

    monkeypatch.setattr(training, "TrainingArguments", arguments)
    with pytest.raises(Stop):
        train(machine, base=tiny)
    assert (seen["fp16"], seen["bf16"]) == expected
    assert seen["use_cpu"] is False


def test_the_fp16_arithmetic_of_a_t4_trains_float32_weights(tiny, records):
    """What the Trainer does on a T4, on the CPU: autocast to fp16, a GradScaler, float32 weights."""
    batch = collate([encode(record, tiny.tokenizer) for record in records], tiny.tokenizer.pad_token_id)
    optimizer, scaler, losses = torch.optim.AdamW(tiny.model.parameters(), lr=1e-3), torch.amp.GradScaler("cpu"), []
    for _ in range(5):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = supervised_loss(tiny.model, batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert all(weight.dtype == torch.float32 for weight in tiny.model.parameters())
