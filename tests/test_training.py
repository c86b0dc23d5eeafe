"""Tests of course_lib.training: the Trainer's steps, its two seams, several processes, and stops
with advice.
"""

import dataclasses
import functools
import shutil

import pytest
import torch
from transformers import Trainer, TrainingArguments

from course_lib import sealing
from course_lib.alpaca import Record
from course_lib.batching import (
    IGNORED,
    Example,
    collate,
    encode,
    encode_prompt,
    encode_records,
    training_order,
)
from course_lib.checkpoints import CheckpointError
from course_lib.evaluation import generate
from course_lib.lora import add_lora, use_adapters
from course_lib.objective import summed_loss, supervised_loss
from course_lib.runtime import GB, CourseError, Gpu, decide
from course_lib.training import TrainingError, finetune
from tests.fixtures.models import CPU, fresh_tiny
from tests.fixtures.processes import in_two_processes
from tests.fixtures.rows import first_fast
from tests.fixtures.runs import QUIET, RECORDS, overflow, same_weights, took_the_same_steps, train


class Oracle(Trainer):
    """transformers' Trainer with the loss of the course."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return summed_loss(model, inputs) / num_items_in_batch


def trained_by_the_trainer(base, folder, steps, batch_size, accumulate):
    examples = encode_records(RECORDS, base.tokenizer, max_tokens=1000).examples
    order = training_order(
        [*map(len, examples)], steps, batch_size * accumulate, group_by_length=False, seed=0
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        train_sampling_strategy="sequential",
        learning_rate=1e-3,
        warmup_steps=2,
        weight_decay=0.0,
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    oracle = Oracle(
        model=base.model,
        args=arguments,
        train_dataset=[examples[index] for index in order],
        data_collator=lambda batch: collate(batch, base.tokenizer.pad_token_id),
    )
    oracle.train()
    base.model.eval()
    return [entry["loss"] for entry in oracle.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", ["full", "LoRA"])
def test_losses_and_weights_equal_the_trainers_to_the_last_bit(
    method, accumulate, machine, tmp_path, capsys
):
    ours, theirs = fresh_tiny(), fresh_tiny()
    for base in (ours, theirs):
        if method == "LoRA":
            add_lora(base.model, 4, 8)
    options = {"steps": 6, "batch_size": 4 // accumulate, "accumulate": accumulate}
    _, run = train(machine, ours, warmup_steps=2, **options)
    expected = trained_by_the_trainer(theirs, tmp_path, **options)
    assert run.losses == expected
    assert same_weights(ours, theirs)


def test_a_batch_overfits_and_is_reproduced(machine, tiny):
    record = Record("Say it.", 'Stone, "paper", scissors!')
    run = finetune(
        tiny,
        [encode(record, tiny.tokenizer)] * 4,
        machine,
        steps=60,
        batch_size=4,
        learning_rate=3e-3,
        say=QUIET,
    )
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
    changed = {
        name
        for name, weight in tiny.model.named_parameters()
        if not torch.equal(weight, before[name])
    }
    assert changed == {
        name for name, weight in tiny.model.named_parameters() if weight.requires_grad
    }


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
        (
            [Example([5, 2], [IGNORED, 2]), Example([5, 2], [IGNORED] * 2)],
            "example 2 has no supervised token",
        ),
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
    with pytest.raises(
        TrainingError,
        match=r"trained weights are torch.float16, expected float32: load the model with dtype",
    ):
        train(machine, base=tiny)


def test_autocast_is_taken_off_the_model_after_training(machine, tiny):
    half = dataclasses.replace(machine, dtype="bfloat16")
    forward = tiny.model.forward
    train(half, base=tiny, steps=1)
    assert tiny.model.forward == forward
    assert tiny.model(torch.tensor([[5, 6]])).logits.dtype == torch.float32


def weights_and_run(method, folder, **options):
    """What a process trains: its weights, and what it did; with what it said."""
    base, said = fresh_tiny(), []
    if method != "full":
        add_lora(base.model, 4, 8)
    if method == "LoRA beside an idle adapter":
        add_lora(base.model, 4, 8, name="idle")
        use_adapters(base.model, "default")
    _, run = train(
        CPU,
        base,
        say=said.append,
        **options,
        **({"folder": folder, "save_every": 2} if folder else {}),
    )
    return [weight.detach().numpy() for weight in base.model.parameters()], run, said


@pytest.mark.parametrize(
    ("method", "accumulate"),
    first_fast(
        [("LoRA beside an idle adapter", 2), ("LoRA", 2), ("LoRA", 1), ("full", 1), ("full", 2)]
    ),
)
def test_two_processes_take_the_same_steps_as_one(method, accumulate, tmp_path):
    weights, run, _ = weights_and_run(method, None, steps=3, batch_size=4, accumulate=accumulate)
    options = {"steps": 3, "batch_size": 2, "accumulate": accumulate}
    for theirs, their_run, _ in in_two_processes(
        tmp_path, functools.partial(weights_and_run, method, None, **options)
    ):
        off = torch.cat(
            [
                torch.from_numpy(one - other).ravel()
                for one, other in zip(theirs, weights, strict=True)
            ]
        ).abs()
        # Adam moves a weight whose gradient is rounding noise as far as any other, in any direction
        assert (off > 1e-4).float().mean() <= 1e-5
        assert off.max() < 1e-3
        assert their_run.losses == pytest.approx(run.losses, abs=1e-5)
        assert their_run.tokens == run.tokens


def test_two_processes_keep_whole_checkpoints_and_go_on_from_them(tmp_path):
    run_folder = tmp_path / "run"
    train_here = functools.partial(weights_and_run, "full", run_folder, steps=4, batch_size=2)
    (weights, unbroken, _), _ = in_two_processes(tmp_path, train_here)
    assert sorted(path.name for path in run_folder.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert [sealing.check(run_folder / f"checkpoint-{step}")["processes"] for step in (2, 4)] == [
        2,
        2,
    ]
    shutil.rmtree(run_folder / "checkpoint-4")
    for rank, (again, run, said) in enumerate(in_two_processes(tmp_path, train_here)):
        assert run.resumed_at == 2
        assert run.losses == unbroken.losses
        assert all((one == other).all() for one, other in zip(again, weights, strict=True))
        assert said == (["going on from checkpoint-2"] if rank == 0 else [])


@pytest.mark.slow
def test_one_process_does_not_go_on_from_a_checkpoint_of_two(machine, tmp_path):
    train_here = functools.partial(weights_and_run, "full", tmp_path / "run", steps=2, batch_size=2)
    in_two_processes(tmp_path, train_here)
    with pytest.raises(CheckpointError, match="of another run .*processes 2 there, 1 now"):
        train(machine, folder=tmp_path / "run", save_every=2, steps=2, batch_size=4)


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_the_dtype_of_the_machine_is_what_the_model_computes_in(capability, expected, tiny):
    gpu = decide(Gpu("Fake", capability, 15 * GB), None, cores=2, memory_bytes=8 * GB)
    computed_in = set()
    tiny.model.model.layers[0].mlp.register_forward_hook(
        lambda module, inputs, output: computed_in.add(output.dtype)
    )
    train(dataclasses.replace(gpu, device="cpu"), tiny, steps=6)  # the scale takes some to fit
    assert computed_in == {expected}
    assert {weight.dtype for weight in tiny.model.parameters()} == {torch.float32}


def test_the_fp16_steps_of_a_t4_are_those_of_autocast_and_gradscaler(machine):
    """A T4's arithmetic on the CPU: forward in fp16, a scaled loss, float32 weights."""
    ours, by_hand = fresh_tiny(), fresh_tiny()
    _, run = train(dataclasses.replace(machine, dtype="float16"), ours, steps=5, batch_size=20)
    examples = encode_records(RECORDS, by_hand.tokenizer, max_tokens=1000).examples
    order = training_order([*map(len, examples)], 5, 20, group_by_length=False, seed=0)
    optimizer = torch.optim.AdamW(by_hand.model.parameters(), weight_decay=0.0, fused=True)
    scaler, losses = torch.amp.GradScaler("cpu"), []
    by_hand.model.train()
    for step in range(5):
        batch = collate(
            [examples[index] for index in order[20 * step : 20 * step + 20]],
            by_hand.tokenizer.pad_token_id,
        )
        with torch.autocast("cpu", dtype=torch.float16):
            loss = supervised_loss(by_hand.model, batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(by_hand.model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * (5 - step) / 5
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert run.losses == losses
    assert same_weights(ours, by_hand)


# --- the two seams


def test_a_loss_of_ones_own_is_a_sum_and_is_divided_by_the_tokens_of_the_step(machine):
    """Twice the loss trains as the loss does, since AdamW divides by the gradient's size and
    clipping shortens it.
    """
    seen = []

    def doubled(model, batch):
        seen.append(int((batch["labels"][:, 1:] != IGNORED).sum()))
        return 2 * summed_loss(model, batch)

    _, run = train(machine, loss=doubled, steps=2, accumulate=2)
    _, expected = train(machine, steps=2, accumulate=2)
    assert run.losses[0] == pytest.approx(2 * expected.losses[0])
    assert len(seen) == 4
    assert sum(seen) == run.supervised_tokens


class Spy:
    """An after_step with a state: how many supervised gradients it has seen."""

    def __init__(self):
        self.steps, self.norms, self.total = [], [], torch.zeros(())

    def __call__(self, model, step):
        self.steps.append(step)
        self.norms.append(
            torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters()]).item()
        )
        self.total += self.norms[-1]

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"].clone()


def test_after_a_step_the_weights_are_new_and_the_clipped_gradients_still_there(machine, tiny):
    before, spy = tiny.model.model.norm.weight.detach().clone(), Spy()

    def after_step(model, step):
        assert model is tiny.model
        if step == 2:  # the first has the learning rate 0
            assert not torch.equal(model.model.norm.weight, before)
        spy(model, step)

    train(machine, tiny, steps=3, warmup_steps=1, after_step=after_step)
    assert spy.steps == [1, 2, 3]
    assert all(0 < norm <= 1 + 1e-5 for norm in spy.norms)
    assert all(weight.grad is None for weight in tiny.model.parameters())


def test_after_step_is_not_called_for_a_skipped_step(machine, tiny):
    overflow(tiny, [3])
    spy = Spy()
    train(dataclasses.replace(machine, dtype="float16"), tiny, steps=4, after_step=spy)
    assert 3 not in spy.steps
    assert spy.steps[-1] == 4


def test_what_after_step_changes_stays_changed(machine, tiny):
    """As AdaLoRA needs it: called before the optimizer's step, AdamW would move the zeroed weights
    again.
    """

    def prune(model, step):
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[:10] = 0

    train(machine, tiny, steps=3, after_step=prune)
    assert not tiny.model.model.layers[0].mlp.up_proj.weight[:10].any()


def test_the_state_of_after_step_goes_on_with_the_run(machine, tmp_path):
    unbroken = Spy()
    train(machine, steps=4, after_step=unbroken)
    train(machine, steps=4, after_step=Spy(), folder=tmp_path, save_every=2)
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = Spy()
    train(machine, steps=4, after_step=resumed, folder=tmp_path, save_every=2)
    assert resumed.steps == [3, 4]
    assert torch.equal(resumed.total, unbroken.total)


def test_a_run_with_other_seams_is_another_run(machine, tmp_path):
    options = {"steps": 2, "folder": tmp_path, "save_every": 2}
    train(machine, **options)
    with pytest.raises(CheckpointError, match=r"after_step NoneType there, Spy .\w+. now"):
        train(machine, after_step=Spy(), **options)
    with pytest.raises(CheckpointError, match=r"loss summed_loss .\w+. there, .*lambda.* now"):
        train(machine, loss=lambda model, batch: summed_loss(model, batch), **options)
