"""Faults of virtual tokens and adapters: impossible numbers and starts, models they cannot enter,
two methods in one model, texts and caches that do not fit, merges that no weight can hold.
"""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    MptConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from course_lib import surgery
from course_lib.adalora import add_adalora
from course_lib.adapters import (
    add_bottlenecks,
    add_ia3,
    add_mam,
    add_parallel,
    add_unipelt,
    train_biases,
    train_norms,
)
from course_lib.batching import (
    Example,
    collate,
    collate_packed,
    encode_records,
    most_positions,
)
from course_lib.lora import DoRALinear, add_lora, merged_copy
from course_lib.memory import checkpoint_blocks
from course_lib.objective import supervised_loss
from course_lib.prefix import add_prefix, add_soft_prompt, states_of, virtual_tokens
from course_lib.qlora import quantize_layers
from course_lib.runtime import CourseError
from course_lib.training import finetune
from tests.fixtures.models import IDS, small_gpt2
from tests.fixtures.runs import RECORDS

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
ADDED = {
    "a prefix": lambda model: add_prefix(model, 4),
    "a soft prompt": lambda model: add_soft_prompt(model, 4),
    "bottlenecks": lambda model: add_bottlenecks(model, 8),
    "parallel adapters": lambda model: add_parallel(model, 8),
    "MAM": lambda model: add_mam(model, 4, 8),
    "UniPELT": lambda model: add_unipelt(model, 4, 2, 8),
    "IA3": add_ia3,
    "biases": train_biases,
    "norms": train_norms,
}
VIRTUAL = ["a prefix", "a soft prompt"]


def state(model):
    """What a refused call must leave as it is."""
    weights = {
        name: (weight.detach().clone(), weight.requires_grad)
        for name, weight in model.named_parameters()
    }
    settings = {name: str(value) for name, value in vars(getattr(model, "config", model)).items()}
    parts = [name for name, _ in model.named_modules()]
    return weights, settings if hasattr(model, "config") else {}, parts


def refused(action, model, message):
    """How a fault is said, and which parts of the model are not as they were."""
    before = state(model) if isinstance(model, nn.Module) else None
    with pytest.raises(CourseError, match=message) as stop:
        action()
    if before is None:
        return {"said": stop.value, "lost": []}
    (weights, *rest), (now, *others) = before, state(model)
    lost = [] if rest == others else ["settings"]
    lost += sorted(weights.keys() ^ now.keys())
    lost += [
        name
        for name in weights.keys() & now.keys()
        if weights[name][1] != now[name][1] or not torch.equal(weights[name][0], now[name][0])
    ]
    return {"said": stop.value, "lost": lost}


# --- D5.1 to D5.3: numbers and starts


@pytest.mark.fault("D5.1", "add_prefix and add_soft_prompt with tokens={tokens!r}")
@pytest.mark.parametrize("tokens", [0, -1, 1.5, True, None, 10**9])
def test_a_number_of_tokens_that_cannot_be_is_refused(tokens, tiny, survived):
    for add in (add_prefix, add_soft_prompt):
        message = "tokens=.* must be a whole number in 1..2047"
        survived(**refused(lambda add=add: add(tiny.model, tokens), tiny.model, message))


@pytest.mark.fault("D5.1", "a seed of {seed!r}")
@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, None])
def test_a_seed_that_torch_does_not_take_is_refused(seed, tiny, survived):
    for add in (add_prefix, add_bottlenecks):
        message = "seed=.* must be a whole number from 0 to"
        action = lambda add=add: add(tiny.model, 4, seed=seed)  # noqa: E731
        survived(**refused(action, tiny.model, message))


@pytest.mark.fault("D5.2", "a network with {options}")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "hidden=0 must be a whole number in 1..65536"),
        ({"hidden": True}, "hidden=True must"),
        ({"hidden": 1.5}, "hidden=1.5 must"),
        ({"encoder": "mlp", "hidden": 0}, "hidden=0 must be a whole number in 1..65536"),
        ({"encoder": "mlp"}, "encoder='mlp' with hidden=None, expected"),
        ({"encoder": "gru", "hidden": 8}, "encoder='gru' with hidden=8, expected"),
    ],
)
def test_a_network_that_cannot_be_is_refused(options, message, tiny, survived):
    add = add_soft_prompt if "encoder" in options else add_prefix
    survived(**refused(lambda: add(tiny.model, 4, **options), tiny.model, message))


STARTS = {  # what is done, the start, what is said
    "a word": ("Random", "start is 'Random', expected \"random\""),
    "another shape": (torch.zeros(4, 7), r"start is \(4, 7\), expected \(4, "),
    "NaN": ("nan", "start has numbers that are not finite"),
    "nothing": (None, "start is a NoneType, expected"),
}


@pytest.mark.fault("D5.3", "a start of {what}")
@pytest.mark.parametrize("what", STARTS)
def test_a_start_that_cannot_be_is_refused(what, tiny, survived):
    start, message = STARTS[what]
    for add in (add_prefix, add_soft_prompt):
        if what == "NaN":
            width = 128 if add is add_soft_prompt else states_of(tiny.model, [5]).shape[1]
            start = torch.full((4, width), math.nan)
        action = lambda add=add, start=start: add(tiny.model, 4, start=start)  # noqa: E731
        survived(**refused(action, tiny.model, message))


@pytest.mark.fault("D5.3", "a soft prompt of 4 that starts from the ids {ids}")
@pytest.mark.parametrize("ids", [[], [5, 6], [5, 6, 7, 10**6], [5, 6, 7, -1], ["a", 1, 2, 3]])
def test_ids_that_are_none_or_not_as_many_are_refused(ids, tiny, survived):
    message = "start is .2, 128., expected|token id .* is beyond|expected 1 to 2048 token ids"
    action = lambda: add_soft_prompt(tiny.model, 4, start=ids)  # noqa: E731
    survived(**refused(action, tiny.model, message))


@pytest.mark.fault("D5.3", "a prompt starts from zeros, a network from a text")
def test_starts_of_the_wrong_kind_are_refused(tiny, survived):
    message = "start is 'zero', expected .random., .vocabulary., or as many ids"
    action = lambda: add_soft_prompt(tiny.model, 4, start="zero")  # noqa: E731
    survived(**refused(action, tiny.model, message))
    states, message = states_of(tiny.model, [5, 6]), "a network cannot be made to give a start"
    action = lambda: add_prefix(tiny.model, 2, hidden=8, start=states)  # noqa: E731
    survived(**refused(action, tiny.model, message))


# --- D5.4: models they cannot enter


def model_called(name):
    if name == "None":
        return None
    if name == "a linear layer":
        return nn.Linear(4, 4)
    if name == "T5":
        sizes = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 2}
        return T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes))
    config = {
        "BLOOM": lambda: BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
        "MPT": lambda: MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4),
        "Falcon": lambda: FalconConfig(**SIZES),
        "Gemma 2": lambda: Gemma2Config(**SIZES, intermediate_size=48, head_dim=8),
    }[name]()
    return AutoModelForCausalLM.from_config(config)


NO_PREFIX = {
    "None": "found a NoneType, expected a model",
    "a linear layer": "a Linear is no model of transformers: give one, such as base.model",
    "T5": "a T5ForConditionalGeneration has an encoder, so it takes no virtual tokens",
    "BLOOM": "takes no positions, so it takes no virtual tokens",
    "MPT": "takes no positions, so it takes no virtual tokens",
    "Falcon": "a FalconForCausalLM does not call transformers' attention interface, so a prefix",
    "Gemma 2": "a Gemma2ForCausalLM has attention of its own",
}


@pytest.mark.fault("D5.4", "add_prefix to {name}")
@pytest.mark.parametrize("name", NO_PREFIX)
def test_a_model_that_no_prefix_can_enter_is_refused_before_anything_changes(name, survived):
    model = model_called(name)
    survived(**refused(lambda: add_prefix(model, 4), model, NO_PREFIX[name]))


@pytest.mark.fault("D5.4", "add_soft_prompt to {name}")
@pytest.mark.parametrize("name", ["None", "a linear layer", "T5", "BLOOM", "MPT"])
def test_a_model_that_no_prompt_can_enter_is_refused(name, survived):
    model = model_called(name)
    survived(**refused(lambda: add_soft_prompt(model, 4), model, NO_PREFIX[name]))


@pytest.mark.fault("D5.4", "adapters on {name}")
@pytest.mark.parametrize("name", ["None", "a linear layer"])
def test_adapters_need_a_model_of_transformers(name, survived):
    model = model_called(name)
    for method, add in ADDED.items():
        survived(**refused(lambda add=add: add(model), model, NO_PREFIX[name])), method


# --- D5.5: two methods in one model

FIRST = {
    "LoRA": lambda model: add_lora(model, 2, 4),
    "AdaLoRA": lambda model: add_adalora(model, 2, 4),
} | ADDED


@pytest.mark.fault("D5.5", "each method of Day 5 on a model with {first}")
@pytest.mark.parametrize("first", FIRST)
def test_a_second_method_is_refused(first, tiny, survived):
    FIRST[first](tiny.model)
    message = "has (an adapter|adapters|virtual tokens) already: remove"
    for add in ADDED.values():
        survived(**refused(lambda add=add: add(tiny.model), tiny.model, message))


@pytest.mark.fault("D5.5", "LoRA and AdaLoRA on a model with {first}")
@pytest.mark.parametrize("first", ADDED)
def test_lora_is_refused_where_it_would_freeze_another_method(first, tiny, survived):
    ADDED[first](tiny.model)
    for add in (add_lora, add_adalora):
        message = "has (adapters|virtual tokens) already: remove_"
        action = lambda add=add: add(tiny.model, 2, 4, ["o_proj"])  # noqa: E731
        survived(**refused(action, tiny.model, message))


@pytest.mark.fault("D5.5", "each method of Day 5 on a model of peft")
def test_a_model_of_peft_is_refused(tiny, survived):
    model = get_peft_model(tiny.model, LoraConfig(r=2))
    for add in ADDED.values():
        survived(**refused(lambda add=add: add(model), model, "an adapter of peft: load the base"))


# --- D5.6: texts that do not fit


@pytest.mark.fault("D5.6", "{name} of 4 and a text of 62 tokens in a model of 64 positions")
@pytest.mark.parametrize("name", VIRTUAL)
def test_a_text_that_no_longer_fits_is_refused(name, survived):
    model = small_gpt2()
    ADDED[name](model)
    message = "62 tokens behind 4 virtual ones, where the model has room for 60: shorten"
    action = lambda: model(torch.ones(1, 62, dtype=torch.int64))  # noqa: E731
    survived(**refused(action, model, message))
    assert model(torch.ones(1, 60, dtype=torch.int64)).logits.shape[1] == 60


@pytest.mark.fault("D5.6", "training {name} of 4 on an example that no longer fits behind it")
@pytest.mark.parametrize("name", VIRTUAL)
def test_an_example_that_no_longer_fits_is_refused_before_the_first_step(
    name, tiny, machine, survived
):
    ADDED[name](tiny.model)
    most = most_positions(tiny.model)
    assert most == tiny.model.config.max_position_embeddings - virtual_tokens(tiny.model).count
    examples = [Example([5] * length, [5] * length) for length in (most, most + 1)]
    settings = {"steps": 1, "batch_size": 1, "learning_rate": 1e-3, "progress": False}
    action = lambda: finetune(tiny, examples, machine, **settings)  # noqa: E731
    message = f"example 2 has {most + 1} tokens, the model takes {most}"
    survived(**refused(action, tiny.model, message))


@pytest.mark.fault("D5.5", "quantize_layers of a model with {name}")
@pytest.mark.parametrize("name", ADDED)
def test_what_was_put_in_is_not_quantised_with_the_base(name, tiny, survived):
    ADDED[name](tiny.model)
    action = lambda: quantize_layers(tiny.model)  # noqa: E731
    survived(**refused(action, tiny.model, "remove_"))


@pytest.mark.fault("D5.6", "states_of {what}")
@pytest.mark.parametrize("what", ["nothing", "65 tokens", "an unknown id", "words", "a prefix"])
def test_a_text_that_the_model_cannot_read_has_no_states(what, survived):
    model = small_gpt2()
    if what == "a prefix":
        add_prefix(model, 4)
    ids = {"nothing": [], "65 tokens": [5] * 65, "an unknown id": [5, 64], "words": ["a"]}
    message = "expected 1 to 64 token ids|token id 64 is beyond|has virtual tokens already"
    survived(**refused(lambda: states_of(model, ids.get(what, [5])), model, message))


# --- D5.7: what a soft prompt cannot stand before


@pytest.mark.fault("D5.7", "a soft prompt before {what}")
@pytest.mark.parametrize("what", ["packed rows", "a static cache", "a cache of the user"])
def test_a_soft_prompt_says_where_it_would_be_wrong(what, tiny, survived):
    packing = encode_records(RECORDS[:2], tiny.tokenizer, 1000).examples
    add_soft_prompt(tiny.model, 4)
    batch = collate_packed([packing], 0, tiny.model)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(IDS)
    static = options | {"cache_implementation": "static"}

    def go_on():
        out = tiny.model.generate(IDS, **options, return_dict_in_generate=True)
        mask = torch.ones_like(out.sequences)
        again = options | {"attention_mask": mask, "past_key_values": out.past_key_values}
        tiny.model.generate(out.sequences, **again)

    action = {
        "packed rows": lambda: supervised_loss(tiny.model, batch),
        "a static cache": lambda: tiny.model.generate(IDS, **static),
        "a cache of the user": go_on,
    }[what]
    message = "cannot stand before packed rows, nor in a static cache: pad|stands in the cache"
    survived(**refused(action, tiny.model, message))


@pytest.mark.fault("F19", "{name} and checkpointed activations")
@pytest.mark.parametrize("name", VIRTUAL)
def test_checkpointing_leaves_no_virtual_token_out(name, tiny, survived):
    ADDED[name](tiny.model)
    batch = collate(encode_records(RECORDS[:2], tiny.tokenizer, 1000).examples, 0)
    table, found = virtual_tokens(tiny.model).table, []
    for blocks in (0, 2):
        checkpoint_blocks(tiny.model, blocks)
        tiny.model.train()
        table.grad = None
        supervised_loss(tiny.model, batch).backward()
        found.append(table.grad.clone())
    assert found[0].any()
    lost = [] if (found[0] - found[1]).abs().max() <= 1e-6 else ["gradients"]
    survived(said="the gradients are those without checkpoints", lost=lost)


# --- D5.8: files and merges

KEPT = "which no weight can hold: keep the model as it is"
UNMERGEABLE = {
    "a prefix": f"virtual_tokens is a Prefix, {KEPT}",
    "a soft prompt": f"virtual_tokens is a SoftPrompt, {KEPT}",
    "bottlenecks": f"o?_?.*proj is a BesideLinear, {KEPT}",
    "parallel adapters": f"model.layers.0.mlp is a Beside, {KEPT}",
    "MAM": f"model.layers.0.mlp is a Beside, {KEPT}",
    "UniPELT": f"is a BesideLinear, {KEPT}",
    "DoRA": f"q_proj is a DoRALinear, {KEPT}",
    "IA3 over 4 bits": "PackedLinear is quantised, so its weight is no matrix",
}


@pytest.mark.fault("D5.8", "merged_copy of {name}")
@pytest.mark.parametrize("name", UNMERGEABLE)
def test_what_no_weight_can_hold_is_not_left_out_of_a_merge(name, tiny, survived):
    if name == "IA3 over 4 bits":
        quantize_layers(tiny.model)
        add_ia3(tiny.model)
    elif name == "DoRA":
        path = "model.layers.0.self_attn.q_proj"
        layer = DoRALinear(tiny.model.get_submodule(path), 2, 4)
        surgery.replace_layer(tiny.model, path, layer)
    else:
        ADDED[name](tiny.model)
    survived(**refused(lambda: merged_copy(tiny.model), tiny.model, UNMERGEABLE[name]))


@pytest.mark.fault("D5.8", "save_pretrained of a model with {name}")
@pytest.mark.parametrize("name", [name for name in ADDED if name != "norms"])
def test_a_file_that_nobody_could_read_is_not_written(name, tiny, tmp_path, survived):
    ADDED[name](tiny.model)
    action = lambda: tiny.model.save_pretrained(tmp_path / "model")  # noqa: E731
    survived(**refused(action, tiny.model, "cannot be saved by save_pretrained"))
    assert not (tmp_path / "model").exists()


# --- D5.9: numbers and targets of adapters

WRONG = {
    "a bottleneck of 0": (lambda m: add_bottlenecks(m, 0), "bottleneck=0 must be a whole number"),
    "a bottleneck of 1.5": (lambda m: add_parallel(m, 1.5), "bottleneck=1.5 must"),
    "a bottleneck of True": (lambda m: add_mam(m, 4, True), "bottleneck=True must"),
    "a scale of NaN": (lambda m: add_parallel(m, 8, math.nan), "scale=nan must be a finite number"),
    "a scale of 0": (lambda m: add_mam(m, 4, 8, 0), "scale=0 must be a finite number above 0"),
    "MAM with 0 tokens": (lambda m: add_mam(m, 0, 8), "tokens=0 must be"),
    "MAM with a network of 0": (lambda m: add_mam(m, 4, 8, hidden=0), "hidden=0 must be"),
    "UniPELT of no rank": (lambda m: add_unipelt(m, 4, None, 8), "rank=None must be"),
    "UniPELT with 0 tokens": (lambda m: add_unipelt(m, 0, 2, 8), "tokens=0 must be"),
    "UniPELT with LoRA everywhere": (
        lambda m: add_unipelt(m, 4, 2, 8, "all-linear"),
        "down_proj gets an adapter: take it out of the targets of LoRA",
    ),
    "bottlenecks behind nothing": (
        lambda m: add_bottlenecks(m, 8, ["dense"]),
        "no linear layer is called 'dense': give a list of some of q_proj",
    ),
    "IA3 on the head": (lambda m: add_ia3(m, ["lm_head"]), "lm_head shares its weight"),
    "IA3 with another feed-forward layer": (
        lambda m: add_ia3(m, ["k_proj"], ["down_proj"]),
        "down_proj is in feedforward and not in targets: add it to both",
    ),
}


@pytest.mark.fault("D5.9", "{what}")
@pytest.mark.parametrize("what", WRONG)
def test_adapters_that_cannot_be_are_refused(what, tiny, survived):
    action, message = WRONG[what]
    survived(**refused(lambda: action(tiny.model), tiny.model, message))


@pytest.mark.fault("D5.9", "norms of a model that has none, bottlenecks of an unknown family")
def test_a_model_without_such_parts_is_refused_before_it_freezes(survived):
    model = model_called("BLOOM")
    message = "for models of type 'bloom' it is not known which layers end attention and FFN: give"
    survived(**refused(lambda: add_bottlenecks(model, 8), model, message))
    model = small_gpt2()
    for name, _ in list(model.named_modules()):
        if "ln_" in name:
            surgery.replace_layer(model, name, nn.Identity())
    message = "a GPT2LMHeadModel has no such weights: choose another method"
    survived(**refused(lambda: train_norms(model), model, message))
