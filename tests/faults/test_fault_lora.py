"""Faults of LoRA: impossible settings and merges, adapter files that are damaged, foreign or
hostile, saves that are broken off.
"""

import errno
import functools
import itertools
import json
import os
import random
import shutil
import signal
import time
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from course_lib import sealing
from course_lib.adapter_files import CONFIG, WEIGHTS, load_adapter, save_adapter
from course_lib.batching import Example
from course_lib.fusion import fused_losses, schedule, train_fused
from course_lib.lora import LoRALinear, add_lora, merged_copy, use_adapters
from course_lib.memory import checkpoint_blocks
from course_lib.runtime import CourseError
from tests.fixtures.broken import PROCESSES, Malicious, cut, die_at, names, snapshot
from tests.fixtures.jobs import BATCHES, PAD, example, with_jobs
from tests.fixtures.models import adapted, fresh_tiny, logits, small_gpt2
from tests.fixtures.rows import first_fast
from tests.fixtures.runs import train


@pytest.fixture
def folder(adapter_folder):
    return adapter_folder


def state(model):
    """Of each weight a copy and whether it trains, by name."""
    return {
        name: (weight.detach().clone(), weight.requires_grad)
        for name, weight in model.named_parameters()
    }


def changed(model, before):
    now = state(model)
    common = before.keys() & now.keys()
    same = {
        name
        for name in common
        if before[name][1] == now[name][1] and torch.equal(before[name][0], now[name][0])
    }
    return sorted((before.keys() | now.keys()) - same)


def refused(action, model, message):
    """How a fault is said, and which of the model's weights are not as they were."""
    before = state(model)
    with pytest.raises(CourseError, match=message) as stop:
        action()
    return {"said": stop.value, "lost": changed(model, before)}


# --- D2.1 to D2.4: add_lora


@pytest.mark.fault("D2.1", "add_lora with rank={rank!r}")
@pytest.mark.parametrize("rank", [0, -1, 2.0, "8", None, 129])
def test_a_rank_that_cannot_be_is_refused_before_anything_changes(rank, tiny, survived):
    message = (
        r"rank=.* in 1..128 for model.layers.0.self_attn.q_proj, a 128 x 128 weight: choose one"
    )
    survived(**refused(lambda: add_lora(tiny.model, rank, 16), tiny.model, message))


@pytest.mark.fault("D2.2", "add_lora with alpha={alpha!r}")
@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf"), 1e39, "16"])
def test_alpha_must_be_a_number_above_0(alpha, tiny, survived):
    survived(
        **refused(
            lambda: add_lora(tiny.model, 8, alpha),
            tiny.model,
            "alpha=.* above 0: try twice the rank",
        )
    )


@pytest.mark.fault("D2.2", "add_lora with seed={seed!r}")
@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, None, "0"])
def test_a_seed_that_torch_does_not_take_is_refused_before_anything_freezes(seed, tiny, survived):
    message = "seed=.* must be a whole number from 0 to .*: choose one"
    survived(**refused(lambda: add_lora(tiny.model, 8, 16, seed=seed), tiny.model, message))


@pytest.mark.fault("D2.3", "add_lora with targets={targets!r}")
@pytest.mark.parametrize("targets", [["q_proj", "query"], "q_porj"])
def test_targets_that_mean_no_layer_are_answered_with_the_layers(targets, tiny, survived):
    message = (
        "no linear layer is called '(query|q_porj)': give a list of some of q_proj, k_proj, "
        "v_proj, .*all-linear"
    )
    survived(**refused(lambda: add_lora(tiny.model, 4, 8, targets), tiny.model, message))


@pytest.mark.fault("D2.3", "add_lora with targets={targets!r}")
@pytest.mark.parametrize("targets", ["*_proj", "(q|v"])
def test_targets_that_are_no_regular_expression_are_answered_with_the_layers(
    targets, tiny, survived
):
    message = (
        "is no regular expression .*: give a list of some of q_proj, k_proj, v_proj, .*all-linear"
    )
    survived(**refused(lambda: add_lora(tiny.model, 4, 8, targets), tiny.model, message))


@pytest.mark.fault("D2.4", "add_lora twice under one name")
def test_an_adapter_is_not_added_twice(survived):
    model = adapted(targets=["q_proj"])
    message = "has an adapter 'default' already: choose another name"
    survived(**refused(lambda: add_lora(model, 2, 4, ["v_proj"]), model, message))


@pytest.mark.fault("D2.4", "add_lora to a model of peft")
def test_a_peft_model_is_refused(tiny, survived):
    model = get_peft_model(tiny.model, LoraConfig(r=2))
    survived(
        **refused(lambda: add_lora(model, 2, 4), model, "an adapter of peft: load the base again")
    )


# --- D2.5: merges


@pytest.mark.fault("D2.5", "merged_copy of an adapter over a 4-bit layer")
def test_an_adapter_is_not_merged_into_codes(survived):
    from bitsandbytes.nn import Linear4bit

    model = nn.Sequential(Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)).to(
        "cpu"
    )
    add_lora(model, 2, 4, ["0"])
    survived(
        **refused(
            lambda: merged_copy(model),
            model,
            "Linear4bit is quantised.*take qlora.dequantized_copy",
        )
    )


@pytest.mark.fault("D2.5", "merged_copy of a model without LoRA")
def test_nothing_to_merge_is_said(tiny, survived):
    survived(
        **refused(
            lambda: merged_copy(tiny.model), tiny.model, "no LoRA layers, .*: add_lora adds them"
        )
    )


@pytest.mark.fault("D2.5", "merged_copy of a single layer")
def test_a_layer_by_itself_is_not_merged_into_itself(survived):
    layer = LoRALinear(nn.Linear(4, 4), 2, 4)
    survived(
        **refused(
            lambda: merged_copy(layer),
            layer,
            r"a LoRALinear cannot be replaced in itself: put it into nn.Sequential",
        )
    )


# --- D2.6 to D2.9: files of adapters


def edit_settings(folder, **changes):
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(settings | changes))


def edit_weights(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def save_dora(folder):
    """In place of what is there, DoRA of peft."""
    shutil.rmtree(folder)
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], use_dora=True
    )
    get_peft_model(fresh_tiny().model, settings).save_pretrained(folder)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
FAULTY = {  # number of the row, what is done to the adapter, how it is said
    "has matrices of another rank than its config": (
        "D2.6",
        lambda folder: edit_settings(folder, r=2),
        r"A of .*q_proj is \(4, 128\), expected \(2, 128\); load the base it was trained on",
    ),
    "has a matrix of another width": (
        "D2.6",
        lambda folder: edit_weights(
            folder, lambda weights: weights.update({f"{FIRST}B.weight": torch.ones(64, 4)})
        ),
        r"B of model.layers.0.self_attn.q_proj is \(64, 4\), expected \(128, 4\); "
        r"load the base it was trained on \(tiny\)",
    ),
    "has half a pair": (
        "D2.6",
        lambda folder: edit_weights(folder, lambda weights: weights.pop(f"{FIRST}B.weight")),
        "B of .* is missing, expected",
    ),
    "is no folder": ("D2.7", shutil.rmtree, f"holds no {CONFIG}: give a folder"),
    "has no weights file": (
        "D2.7",
        lambda folder: (folder / WEIGHTS).unlink(),
        f"holds no {WEIGHTS}: give a folder",
    ),
    "has truncated weights": (
        "D2.7",
        lambda folder: cut(folder / WEIGHTS),
        "damaged .*: save or download it again",
    ),
    "has a web page for a config": (
        "D2.7",
        lambda folder: (folder / CONFIG).write_text("<html>"),
        "damaged .*: save or download it again",
    ),
    "has a list for a config": (
        "D2.7",
        lambda folder: (folder / CONFIG).write_text("[]"),
        "does not describe an adapter known here: expected",
    ),
    "has a config without a rank": (
        "D2.7",
        lambda folder: (folder / CONFIG).write_text('{"peft_type": "LORA"}'),
        "does not describe LoRA: expected peft_type LORA, r and lora_alpha",
    ),
    "has a rank in quotes": (
        "D2.7",
        lambda folder: edit_settings(folder, r="4"),
        "has r='4' and lora_alpha=8, expected a whole number",
    ),
    "has an alpha in quotes": (
        "D2.7",
        lambda folder: edit_settings(folder, lora_alpha="8"),
        "lora_alpha='8', expected .* a number",
    ),
    "has no tensors": ("D2.7", lambda folder: edit_weights(folder, dict.clear), r"\(no weights\)"),
    "is IA3": (
        "D2.9",
        lambda folder: edit_settings(folder, peft_type="IA3"),
        "is not plain IA3",
    ),
    "is peft's DoRA": ("D2.9", save_dora, r"not plain LoRA \(use_dora\): load it with peft"),
    "is PiSSA": (
        "D2.9",
        lambda folder: edit_settings(folder, init_lora_weights="pissa"),
        r"\(init_lora_weights=pissa\)",
    ),
    "has an alpha for each layer": (
        "D2.9",
        lambda folder: edit_settings(folder, alpha_pattern={"q_proj": 2}),
        "alpha_pattern",
    ),
    "has a whole output head": (
        "D2.9",
        lambda folder: edit_weights(
            folder,
            lambda weights: weights.update({"base_model.model.lm_head.weight": torch.ones(2)}),
        ),
        r"does not fit: lm_head.weight is \(2,\), expected \(1536, 128\); load the base it was",
    ),
}


def refused_files(folder, model, message):
    """The same of an adapter that is not loaded, with its files."""
    before = snapshot(folder)
    outcome = refused(lambda: load_adapter(model, folder), model, message)
    return outcome | {"lost": outcome["lost"] + ([] if snapshot(folder) == before else ["files"])}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=pytest.mark.fault(FAULTY[fault][0], "the adapter {fault}"))
        for fault in FAULTY
    ],
)
def test_a_faulty_adapter_is_refused_and_the_model_stays(fault, folder, tiny, survived):
    _, damage, message = FAULTY[fault]
    (folder / sealing.SEAL).unlink()  # as peft writes it, so that nothing but the content tells
    damage(folder)
    survived(**refused_files(folder, tiny.model, message))


@pytest.mark.fault("D2.7", "the adapter was sealed and {what} later")
@pytest.mark.parametrize("what", ["cut off", "given another rank"])
def test_a_sealed_adapter_that_changed_is_refused_by_its_checksum(what, folder, tiny, survived):
    if what == "cut off":
        cut(folder / WEIGHTS)
    else:
        edit_settings(folder, r=2)
    message = (
        f"differs from its checksum.*: save it again, or delete {sealing.SEAL} if another program "
        "changed it"
    )
    survived(**refused_files(folder, tiny.model, message))


@pytest.mark.fault("D2.6", "the adapter is of a Llama, the base a GPT-2")
def test_an_adapter_of_another_architecture_is_refused(folder, survived):
    message = "is for another base .*no linear layer model.layers.0.self_attn.q_proj"
    survived(**refused_files(folder, small_gpt2(), message))


@pytest.mark.fault("D2.8", "the adapter is a malicious pickle, {name}")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "adapter_model.bin",
            f"holds a pickle, which can run code.*: ask for the adapter as {WEIGHTS}",
        ),
        (WEIGHTS, "is damaged"),
    ],
)
def test_a_pickled_adapter_is_not_read(name, message, folder, canary, tiny, survived):
    for file in (sealing.SEAL, WEIGHTS):
        (folder / file).unlink()
    torch.save(Malicious(canary), folder / name)
    outcome = refused_files(folder, tiny.model, message)
    survived(said=outcome["said"], lost=outcome["lost"] + [canary] * canary.exists())


# --- D2.10 and D2.11: saves that are broken off

FULL_DISK = {
    "at the weights": (
        "course_lib.tensor_files.save_file",
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ),
    "at the seal": ("course_lib.sealing.seal", OSError(errno.ENOSPC, "No space left on device")),
}


@pytest.mark.fault("D2.10", "the disk was full {place} of an adapter that replaces another one")
@pytest.mark.parametrize("place", FULL_DISK)
def test_a_full_disk_leaves_the_old_adapter(place, folder, monkeypatch, survived):
    name, error = FULL_DISK[place]

    def full(*arguments, **options):
        raise error

    monkeypatch.setattr(name, full)
    before, model = snapshot(folder.parent), adapted()
    message = r"cannot be written \(.*No space left on device.*; 0\.\d MB\): choose another folder"
    outcome = refused(lambda: save_adapter(model, folder), model, message)
    survived(
        said=outcome["said"],
        lost=outcome["lost"] + ([] if snapshot(folder.parent) == before else ["files"]),
    )


def save_another(folder, fault):
    model = adapted(targets=["k_proj"])
    fault()
    save_adapter(model, folder)


PARTIAL, REPLACED = f"{sealing.PARTIAL}adapter", f"{sealing.REPLACED}adapter"
IN_A_SAVE = {  # what is called there, for which time; what then lies in the folder
    "with the config written, the weights not": (
        *("course_lib.tensor_files.save_file", 1),
        [PARTIAL, "adapter"],
    ),
    "with everything written, not sealed": ("course_lib.sealing.seal", 1, [PARTIAL, "adapter"]),
    "with everything sealed, the old one in its place": ("os.replace", 1, [PARTIAL, "adapter"]),
    "with the old one renamed, the new one not": ("os.replace", 2, [PARTIAL, REPLACED]),
}


@pytest.mark.fault(
    "D2.11", "killed with SIGKILL while it saved an adapter in place of another one, {place}"
)
@pytest.mark.parametrize("place", first_fast(IN_A_SAVE))
def test_a_save_that_is_killed_leaves_the_old_adapter(place, folder, tiny, survived):
    name, call, left = IN_A_SAVE[place]
    expected, before = adapted(targets=["q_proj", "v_proj"]), snapshot(folder)
    fault = functools.partial(die_at, name, call)
    process = PROCESSES.Process(target=save_another, args=(folder, fault))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert names(folder.parent) == left, "it was not killed in this save"
    load_adapter(tiny.model, folder)
    lost = (
        []
        if snapshot(folder) == before and torch.equal(logits(tiny.model), logits(expected))
        else ["the old adapter"]
    )
    save_another(folder, lambda: None)
    lost += [] if os.listdir(folder.parent) == [folder.name] else ["order in the folder"]
    survived(
        said="nothing: load_adapter gives the old one, and the next save_adapter replaces it",
        lost=lost,
    )


def save_by_turns(folder, begun):
    """Save one of two adapters in place of the other, for ever."""
    turns = [adapted(targets=[target]) for target in ("q_proj", "k_proj")]
    begun.send("begins")
    for number in itertools.count():
        save_adapter(turns[number % 2], folder)


@pytest.mark.slow
@pytest.mark.fault("D2.11", "killed with SIGKILL at 50 random moments of replacing an adapter")
def test_50_saves_killed_at_random_moments_leave_the_old_or_the_new_adapter(folder, survived):
    both = [logits(adapted(targets=[target])) for target in ("q_proj", "k_proj")]
    save_adapter(adapted(targets=["q_proj"]), folder)
    moments, found, lost = random.Random(0), Counter(), []
    for number in range(50):
        here, there = PROCESSES.Pipe()
        process = PROCESSES.Process(target=save_by_turns, args=(folder, there))
        process.start()
        here.recv()
        time.sleep(moments.random() / 10)
        process.kill()
        process.join()
        left = names(folder.parent)
        model = fresh_tiny().model
        load_adapter(model, folder)
        whole = [which for which in (0, 1) if torch.equal(logits(model), both[which])]
        lost += [] if whole else [f"the adapter of save {number}"]
        found["in a save" if left != [folder.name] else "between two"] += 1
    assert found["in a save"] > 10
    survived(said=f"nothing: load_adapter gives a whole one ({dict(found)})", lost=lost)


# --- D2.12: choosing adapters


@pytest.mark.fault("D2.12", "a blend of adapters of different layers")
def test_a_blend_that_some_layers_would_get_half_of_is_refused(survived):
    model = adapted(adapted(targets=["q_proj"], name="one"), ["q_proj", "v_proj"], name="two")
    use_adapters(model, "one")
    before = logits(model)
    message = "'one' and 'two' change different layers: blend adapters made with the same targets"
    outcome = refused(lambda: use_adapters(model, {"one": 0.5, "two": 0.5}), model, message)
    survived(
        said=outcome["said"],
        lost=outcome["lost"] + ([] if torch.equal(logits(model), before) else ["the choice"]),
    )


@pytest.mark.fault("D2.12", "use_adapters with an unknown name, of {adapters} known ones")
@pytest.mark.parametrize(("adapters", "known"), [(0, "none: add_lora adds one"), (1, "two")])
def test_an_unknown_adapter_is_answered_with_the_known_ones(adapters, known, survived):
    model = adapted(name="two") if adapters else fresh_tiny().model
    before = logits(model)
    outcome = refused(
        lambda: use_adapters(model, "one"), model, f"'one' is not known, the model has {known}"
    )
    survived(
        said=outcome["said"],
        lost=outcome["lost"] + ([] if torch.equal(logits(model), before) else ["the choice"]),
    )


@pytest.mark.fault("D2.12", "use_adapters with {choice!r}")
@pytest.mark.parametrize("choice", [None, ["one", "two"]])
def test_a_choice_that_is_neither_a_name_nor_weights_is_refused(choice, survived):
    model = adapted(adapted(name="one"), name="two")
    before = logits(model)
    outcome = refused(
        lambda: use_adapters(model, choice),
        model,
        "expected a name, weights such as .*, or {} for nothing",
    )
    survived(
        said=outcome["said"],
        lost=outcome["lost"] + ([] if torch.equal(logits(model), before) else ["the choice"]),
    )


@pytest.mark.fault("D2.12", "finetune with no adapter in use")
def test_training_without_an_adapter_in_use_is_refused(machine, survived):
    base = fresh_tiny()
    use_adapters(adapted(base.model), {})
    message = "no weight requires a gradient.*: add an adapter, or choose one with use_adapters"
    survived(**refused(lambda: train(machine, base, progress=False), base.model, message))


# --- D2.13: fusion

FUSED = {
    "fused_losses": fused_losses,
    "train_fused": lambda model, step, pad: train_fused(model, [step], 1e-3, pad),
}


@pytest.mark.fault("D2.13", "{function} with a job that is no adapter")
@pytest.mark.parametrize("function", FUSED)
def test_an_unknown_job_is_answered_with_the_known_ones(function, survived):
    model, step = with_jobs(), {"one": [example(4, 0)], "five": [example(4, 0)]}
    message = "'five' is not known, the model has one, two, four, three"
    survived(**refused(lambda: FUSED[function](model, step, PAD), model, message))


@pytest.mark.fault("D2.13", "{function} with checkpointed activations")
@pytest.mark.parametrize("function", FUSED)
def test_checkpointed_activations_are_refused(function, survived):
    model = with_jobs().train()
    checkpoint_blocks(model, 1)
    message = r"not checkpointed: call memory.checkpoint_blocks\(model, 0\)"
    survived(**refused(lambda: FUSED[function](model, BATCHES, PAD), model, message))


@pytest.mark.fault("D2.13", "{function} with a token that the model does not know")
@pytest.mark.parametrize("function", FUSED)
def test_tokens_of_another_tokenizer_are_refused(function, survived):
    model, step = with_jobs(), {"one": [Example([1, 99_999], [1, 99_999])]}
    message = "token id 99999 is beyond the model's 1536 embeddings"
    survived(**refused(lambda: FUSED[function](model, step, PAD), model, message))


@pytest.mark.fault("D2.13", "train_fused with {what}")
@pytest.mark.parametrize("what", ["no steps", "jobs in place of steps", "a generator"])
def test_steps_are_a_list_that_is_not_empty(what, survived):
    steps = {
        "no steps": [],
        "jobs in place of steps": {"one": [[example(4, 0)]]},
        "a generator": (step for step in [BATCHES]),
    }
    model = with_jobs()
    message = r"expected a list of steps, at least one: schedule\(jobs, budget\) makes it"
    survived(**refused(lambda: train_fused(model, steps[what], 1e-3, PAD), model, message))


@pytest.mark.fault("D2.13", "schedule with budget={budget!r}")
@pytest.mark.parametrize("budget", [0, float("nan"), "100", None])
def test_a_budget_is_a_whole_number(budget, survived):
    with pytest.raises(
        CourseError, match="budget=.* must be a whole number of tokens, at least 1"
    ) as stop:
        schedule({"one": [[example(4, 0)]]}, budget)
    survived(said=stop.value, lost=[])


@pytest.mark.fault("D2.13", "schedule with a list of examples in place of a list of batches")
def test_a_job_of_examples_is_refused(survived):
    with pytest.raises(
        CourseError,
        match="batch 1 of job 'one' is no list of examples: give each job a list of such lists",
    ) as stop:
        schedule({"one": [example(4, 0)]}, 100)
    survived(said=stop.value, lost=[])
