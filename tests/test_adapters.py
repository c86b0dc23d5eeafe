"""Tests of course_lib.adapters: IA3 equals peft's, and every method of Day 5 begins as it should,
sees no later token, trains alone, and goes without a trace.
"""

import copy
import math
import re

import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from course_lib import models, prefix
from course_lib.adapters import (
    Beside,
    IA3Linear,
    add_bottlenecks,
    add_ia3,
    add_mam,
    add_parallel,
    add_unipelt,
    beside,
    choice_losses,
    feedforward_modules,
    ia3_layers,
    log_probabilities,
    norms,
    originals_of,
    remove_adapters,
    train_biases,
    train_norms,
)
from course_lib.batching import Example, collate, encode_records
from course_lib.lora import merged_copy
from course_lib.memory import checkpoint_blocks
from course_lib.objective import summed_loss, supervised_loss
from course_lib.prefix import add_prefix, add_soft_prompt
from course_lib.qlora import quantize_layers
from course_lib.runtime import CourseError
from course_lib.surgery import count_parameters, is_quantized, linear_layers
from tests.fixtures.models import IDS, fresh_tiny, logits, small_gpt2, with_random_biases
from tests.fixtures.runs import RECORDS, train

VIRTUAL = {
    "prompt": lambda model: add_soft_prompt(model, 4),
    "P-tuning, MLP": lambda model: add_soft_prompt(model, 4, encoder="mlp", hidden=8),
    "P-tuning, LSTM": lambda model: add_soft_prompt(model, 4, encoder="lstm", hidden=8),
    "prefix": lambda model: add_prefix(model, 4),
    "prefix, MLP": lambda model: add_prefix(model, 4, hidden=8),
    "MAM": lambda model: add_mam(model, 4, 8),
    "UniPELT": lambda model: add_unipelt(model, 4, 2, 8),
}
IDENTICAL = {  # at the start
    "bottlenecks": lambda model: add_bottlenecks(model, 8),
    "parallel": lambda model: add_parallel(model, 8),
    "IA3": add_ia3,
    "biases": train_biases,
    "norms": train_norms,
}
METHODS = VIRTUAL | IDENTICAL
every_method = pytest.mark.parametrize("method", METHODS)
identical = pytest.mark.parametrize("method", IDENTICAL)


def small_llama(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        **options,
    )
    return with_random_biases(AutoModelForCausalLM.from_config(config))


BASES = {
    "tiny": lambda: fresh_tiny().model,
    "llama with biases": lambda: small_llama(attention_bias=True, mlp_bias=True),
    "gpt2": lambda: with_random_biases(small_gpt2()),
}
every_base = pytest.mark.parametrize("base", BASES)


def shaken(model, seed=2):
    """With all that trains away from its start, as after training."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) / 20)
    return model


def trained_names(model):
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


# --- identity at the start


@every_base
@identical
def test_what_begins_as_identity_changes_no_bit(method, base):
    model = BASES[base]()
    before = logits(model)
    METHODS[method](model)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(shaken(model)), before)


def test_of_unipelt_and_mam_only_the_prefix_changes_anything_at_the_start(tiny):
    for method in ("MAM", "UniPELT"):
        model, plain = copy.deepcopy(tiny.model), copy.deepcopy(tiny.model)
        METHODS[method](model)
        add_prefix(plain, 4)
        prefix.virtual_tokens(plain).gates = prefix.virtual_tokens(model).gates
        assert torch.equal(logits(model), logits(plain))


# --- agreement with a reference


@every_base
def test_ia3_equals_pefts_in_logits_gradients_and_merged_weights(base):
    ours, theirs = BASES[base](), BASES[base]()
    theirs = get_peft_model(theirs, IA3Config(task_type="CAUSAL_LM")).eval()
    add_ia3(ours)
    scales = {
        name.removeprefix("base_model.model.").removesuffix(".ia3_l.default"): weight
        for name, weight in theirs.named_parameters()
        if "ia3_l" in name
    }
    assert scales.keys() == ia3_layers(ours).keys()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, layer in ia3_layers(ours).items():
            scales[name].add_(torch.randn_like(scales[name]) / 5)
            layer.scale.copy_(scales[name].flatten())
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for name, layer in ia3_layers(ours).items():
        assert (layer.scale.grad - scales[name].grad.flatten()).abs().max() <= 1e-5
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-5
    merged, expected = merged_copy(ours).state_dict(), theirs.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys() == BASES[base]().state_dict().keys()
    for name, weight in merged.items():
        assert (weight - expected[name]).abs().max() <= 1e-6


def test_norms_and_biases_that_train_are_those_of_their_names():
    for base in BASES.values():
        model = base()
        train_norms(model)
        expected = {
            name for name, _ in model.named_parameters() if "norm" in name or ".ln_" in name
        }
        assert trained_names(model) == expected == originals_of(model).keys()
    model = BASES["gpt2"]()
    names = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    train_biases(model)
    assert trained_names(model) == names


def test_a_bottleneck_and_its_neighbours_compute_their_equations():
    torch.manual_seed(0)
    base, x = nn.Linear(6, 6), torch.randn(2, 3, 6)
    layers = {
        reads: Beside(base, nn.Sequential(nn.Linear(6, 6)), 6, reads_output=reads, gated=True)
        for reads in (True, False)
    }
    for reads, layer in layers.items():
        read = base(x) if reads else x
        gate = torch.sigmoid(read @ layer.gate.weight.T + layer.gate.bias)
        torch.testing.assert_close(layer(x), base(x) + gate * layer.update(read))
    model = small_llama()
    add_parallel(model, 5, scale=3.0)
    layer = shaken(model).model.layers[0].mlp
    x = torch.randn(2, 3, 32)
    hidden = torch.relu(x @ layer.update.down.weight.T + layer.update.down.bias)
    added = 3.0 * (hidden @ layer.update.up.weight.T + layer.update.up.bias)
    torch.testing.assert_close(layer(x), layer.base(x) + added)


def plain_choice_losses(model, prompt, answers, right):
    """By hand: log-probabilities of each answer, one row at a time."""
    found = []
    for answer in answers:
        ids = torch.tensor([prompt + answer])
        logp = model(ids).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        found.append(torch.stack([logp[p, t] for p, t in zip(places, answer, strict=True)]))
    wrong = [p for place, row in enumerate(found) if place != right for p in row.exp()]
    scores = torch.stack([row.sum() / len(row) for row in found])
    return {
        "LM": -found[right].sum() / len(found[right]),
        "unlikelihood": sum(-(1 - p).log() for p in wrong) / len(wrong),
        "length-normalised": -(scores[right].exp() / scores.exp().sum()).log(),
    }


def test_the_three_losses_of_ia3_and_their_gradients_are_those_computed_by_hand(tiny):
    add_ia3(tiny.model)
    prompt, answers = [5, 6, 7], [[8, 9], [10], [11, 12, 13]]
    rows = [Example(prompt + one, [-100] * len(prompt) + one) for one in answers]
    weights = [weight for weight in tiny.model.parameters() if weight.requires_grad]
    found = choice_losses(log_probabilities(tiny.model, collate(rows, 0)), 1)
    expected = plain_choice_losses(tiny.model, prompt, answers, 1)
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        torch.testing.assert_close(loss, expected[name], atol=1e-5, rtol=0)
        torch.testing.assert_close(
            torch.autograd.grad(loss, weights, retain_graph=True),
            torch.autograd.grad(expected[name], weights, retain_graph=True),
            atol=1e-5,
            rtol=0,
        )


# --- the mathematical property


@every_base
@every_method
def test_a_later_token_changes_no_earlier_logits(method, base):
    model = BASES[base]()
    METHODS[method](model)
    shaken(model)
    other = IDS.clone()
    other[:, 3] += 20
    with torch.no_grad():
        before, after = model(IDS).logits, model(other).logits
    torch.testing.assert_close(before[:, :3], after[:, :3], atol=1e-6, rtol=0)
    assert (before[:, 3] - after[:, 3]).abs().max() > 1e-4


@every_method
def test_a_padded_row_computes_what_it_computes_alone(method, tiny):
    METHODS[method](tiny.model)
    shaken(tiny.model)
    ids = torch.tensor([[0, 0, 5, 6, 7], [5, 6, 7, 0, 0]])
    with torch.no_grad():
        alone = tiny.model(ids[:1, 2:]).logits[0]
        batch = tiny.model(ids, attention_mask=(ids > 0).long()).logits
    torch.testing.assert_close(batch[0, 2:], alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(batch[1, :3], alone, atol=1e-4, rtol=0)


def test_a_closed_gate_is_the_absence_of_its_adapter_and_a_prefix_of_zeros(tiny):
    plain = copy.deepcopy(tiny.model)
    add_unipelt(tiny.model, 4, 2, 8)
    shaken(tiny.model)
    with torch.no_grad():
        prefix.virtual_tokens(tiny.model).gates.fill_(-math.inf)
        for one in beside(tiny.model).values():
            one.gate.weight.zero_()
            one.gate.bias.fill_(-math.inf)
    add_prefix(plain, 4, start="zero")
    assert torch.equal(logits(tiny.model), logits(plain))


def test_every_gate_of_unipelt_opens_and_closes_its_part(tiny):
    add_unipelt(tiny.model, 4, 2, 8)
    start = {name: weight.clone() for name, weight in tiny.model.named_parameters()}
    shaken(tiny.model)
    with torch.no_grad():  # half open, as at the start: each for inputs of any size
        for name, weight in tiny.model.named_parameters():
            if ".gate." in name:
                assert not start[name].any()
                weight.zero_()
    before = logits(tiny.model)
    gates = [one.gate.bias for one in beside(tiny.model).values()]
    gates += [prefix.virtual_tokens(tiny.model).gates]
    assert len(gates) == 3 * tiny.model.config.num_hidden_layers + 1
    for gate in gates:
        kept = gate.detach().clone()
        with torch.no_grad():
            gate.fill_(-20)
        assert not torch.equal(logits(tiny.model), before)
        with torch.no_grad():
            gate.copy_(kept)


def test_unipelts_adapters_stand_behind_the_feed_forward_layers_alone():
    for base, ending in (("gpt2", "mlp.c_proj"), ("tiny", "mlp.down_proj")):
        model = BASES[base]()
        add_unipelt(model, 4, 2, 8)
        behind = [path for path, one in beside(model).items() if one.reads_output]
        assert len(behind) == model.config.num_hidden_layers
        assert all(path.endswith(ending) for path in behind)


@every_base
def test_ia3_merges_into_weights_and_biases(base):
    model = BASES[base]()
    add_ia3(model)
    before = logits(shaken(model))
    merged = merged_copy(model)
    torch.testing.assert_close(logits(merged), before, atol=1e-5, rtol=0)
    assert not any(isinstance(one, IA3Linear) for one in merged.modules())
    assert torch.equal(logits(model), before)


def test_ia3_on_a_head_of_its_own_merges_into_it():
    model = small_llama(tie_word_embeddings=False)
    names = model.state_dict().keys()
    add_ia3(model, ["lm_head", "down_proj"], ["down_proj"])
    before = logits(shaken(model))
    merged = merged_copy(model)
    torch.testing.assert_close(logits(merged), before, atol=1e-5, rtol=0)
    assert merged.state_dict().keys() == names


# --- numbers of weights


def test_houlsbys_adapters_on_bert_large_have_6_343_680_weights():
    config = BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    with torch.device("meta"):
        model = BertForMaskedLM(config)
    add_bottlenecks(model, 64, ["output.dense"])
    assert len(beside(model)) == 48
    assert count_parameters(model).trained == 6_343_680


def test_ia3_on_t0_has_1_081_344_weights():
    config = T5Config(
        d_model=4096,
        d_kv=64,
        num_heads=64,
        d_ff=10_240,
        num_layers=24,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    add_ia3(model)
    assert count_parameters(model).trained == 1_081_344


# --- what stays untouched


@every_base
@every_method
def test_removed_it_leaves_the_base_bit_for_bit(method, base, tmp_path):
    model = BASES[base]()
    before, state = logits(model), copy.deepcopy(model.state_dict())
    for _ in range(2):  # added, changed and removed again
        METHODS[method](model)
        shaken(model)
        remove_adapters(model)
        assert torch.equal(logits(model), before)
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
        assert all(weight.requires_grad for weight in model.parameters())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), before)


@every_method
def test_the_seed_decides_the_start_and_the_global_generator_stays(method, tiny):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, other = copy.deepcopy(tiny.model), copy.deepcopy(tiny.model)
    METHODS[method](one)
    METHODS[method](other)
    assert torch.equal(torch.get_rng_state(), state)
    for weight, same in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, same)


@pytest.mark.parametrize(
    "add",
    [
        lambda model, seed: add_bottlenecks(model, 4, seed=seed),
        lambda model, seed: add_parallel(model, 4, seed=seed),
        lambda model, seed: add_mam(model, 3, 4, seed=seed),
        lambda model, seed: add_unipelt(model, 3, 2, 4, seed=seed),
        lambda model, seed: add_prefix(model, 3, hidden=4, seed=seed),
        lambda model, seed: add_soft_prompt(model, 3, start="vocabulary", seed=seed),
    ],
)
def test_another_seed_is_another_start(add, tiny):
    models = {seed: copy.deepcopy(tiny.model) for seed in (1, 2)}
    for seed, model in models.items():
        add(model, seed)
    pairs = zip(models[1].parameters(), models[2].parameters(), strict=True)
    assert not all(torch.equal(one, other) for one, other in pairs)


def test_a_run_of_another_scale_is_another_run(machine, tmp_path):
    settings = {"folder": tmp_path / "run", "save_every": 2, "learning_rate": 1e-2, "steps": 2}
    for scale in (4.0, 1.0):
        base = fresh_tiny()
        add_parallel(base.model, 4, scale)
        if scale == 4.0:
            train(machine, base, **settings)
        else:
            with pytest.raises(CourseError, match="trained weights"):
                train(machine, base, **settings)


def test_no_generator_of_a_gpu_is_seeded(tiny, monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    add_prefix(tiny.model, 3)
    assert not seeded


@every_method
def test_a_run_lowers_the_loss_leaves_the_base_and_resumes(method, machine, tmp_path):
    def run(name, base=None, **options):
        base = base or fresh_tiny()
        METHODS[method](base.model)
        options = {"folder": tmp_path / name, "save_every": 2, "learning_rate": 1e-2} | options
        return train(machine, base, steps=4, group_by_length=True, **options)

    plain = fresh_tiny().model.state_dict()
    base, outcome = run("unbroken")
    trained = {name for name, weight in base.model.named_parameters() if weight.requires_grad}
    assert all(weight.dtype == torch.float32 for weight in base.model.parameters())
    kept = 0
    for name, weight in base.model.state_dict().items():
        if (own := name.replace(".base.", ".")) in plain and name not in trained:
            assert torch.equal(weight, plain[own])
            kept += 1
    assert kept >= len(plain) - len(originals_of(base.model))
    (tmp_path / "broken").mkdir()
    (tmp_path / "unbroken" / "checkpoint-2").rename(tmp_path / "broken" / "checkpoint-2")
    resumed, later = run("broken")
    assert later.resumed_at == 2
    assert later.losses == outcome.losses
    assert torch.equal(logits(resumed.model), logits(base.model))
    batch = collate(encode_records(RECORDS[:4], base.tokenizer, 99).examples, 0)
    before = fresh_tiny()
    METHODS[method](before.model)
    with torch.no_grad():
        assert supervised_loss(base.model, batch) < supervised_loss(before.model, batch)


@every_method
def test_checkpointed_activations_have_the_same_gradients(method, tiny):
    METHODS[method](tiny.model)
    shaken(tiny.model).train()
    batch = collate(encode_records(RECORDS[:2], tiny.tokenizer, 99).examples, 0)

    def gradients():
        tiny.model.zero_grad()
        summed_loss(tiny.model, batch).backward()
        return [weight.grad for weight in tiny.model.parameters() if weight.requires_grad]

    expected = gradients()
    checkpoint_blocks(tiny.model, 2)
    torch.testing.assert_close(gradients(), expected, atol=1e-5, rtol=1e-5)


@every_method
@pytest.mark.parametrize("packed", ["ours", "bitsandbytes"])
def test_over_a_4_bit_base_it_trains_and_the_codes_stay(method, packed, machine):
    base = fresh_tiny() if packed == "ours" else models.load("tiny", machine, quantize="nf4")
    if packed == "ours":
        quantize_layers(base.model)
    layers = [one for one in linear_layers(base.model).values() if is_quantized(one)]
    codes = [layer.weight.clone() for layer in layers]
    METHODS[method](base.model)
    _, outcome = train(machine, base, steps=2)
    assert all(math.isfinite(loss) for loss in outcome.losses)
    assert len(codes) == 7 * base.model.config.num_hidden_layers
    assert all(torch.equal(layer.weight, code) for layer, code in zip(layers, codes, strict=True))


@every_method
def test_over_a_bfloat16_base_what_is_added_is_float32(method):
    model = fresh_tiny().model.to(torch.bfloat16)
    METHODS[method](model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            own = method in ("norms", "biases")  # weights of the base itself, which keep its type
            assert weight.dtype == (torch.bfloat16 if own else torch.float32), name
            assert weight.grad.isfinite().all(), name
    assert logits(model).isfinite().all()  # without autocast


@every_method
def test_a_copy_is_independent(method, tiny):
    METHODS[method](tiny.model)
    before, other = logits(tiny.model), copy.deepcopy(tiny.model)
    assert torch.equal(logits(other), before)
    assert not torch.equal(logits(shaken(other)), before)
    assert torch.equal(logits(tiny.model), before)
    remove_adapters(other)
    assert torch.equal(logits(other), logits(fresh_tiny().model))
    assert torch.equal(logits(tiny.model), before)


@every_method
def test_a_compiled_model_is_changed_and_restored_as_the_model_in_it(method, tiny):
    compiled, before = torch.compile(tiny.model), logits(tiny.model)
    METHODS[method](compiled)
    assert not torch.equal(logits(shaken(tiny.model)), before)
    remove_adapters(compiled)
    assert torch.equal(logits(tiny.model), before)


# --- hostile input; more of it is in tests/faults/test_fault_prefix.py


@pytest.mark.parametrize(
    ("choices", "right", "message"),
    [
        ([2], 0, "found 1 answers of .2. tokens, expected two or more"),
        ([], 0, "found 0 answers"),
        ([2, 0], 0, "found 2 answers of .2, 0. tokens"),
        ([2, 3], 2, "right=2 must be a whole number in 0..1"),
        ([2, 3], -1, "right=-1"),
        ([2, 3], True, "right=True"),
    ],
)
def test_choices_without_a_loss_are_refused(choices, right, message):
    with pytest.raises(CourseError, match=message):
        choice_losses([torch.full((number,), -1.0) for number in choices], right)


@pytest.mark.parametrize("add", [lambda m: add_mam(m, 3, 4), lambda m: add_unipelt(m, 3, 2, 4)])
def test_the_tokens_of_a_combination_are_not_taken_out_alone(add, tiny):
    model = copy.deepcopy(tiny.model)
    add(model)
    before = [*model.state_dict()]
    with pytest.raises(CourseError, match="take it out whole, with adapters.remove_adapters"):
        prefix.remove_virtual_tokens(model)
    assert [*model.state_dict()] == before
    remove_adapters(model)
    assert [*model.state_dict()] == [*tiny.model.state_dict()]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda m: train_norms(m, ["model.nrom"]), "'model.nrom' is no normalisation"),
        (lambda m: add_ia3(m, feedforward=["down_proj"]), "feedforward without targets"),
        (lambda m: add_bottlenecks(m, 10**12), "must be a whole number in 1..65536"),
        (lambda m: prefix.add_prefix(m, 3, hidden=10**7), "must be a whole number in 1..65536"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_changes(wrong, says, tiny):
    model = copy.deepcopy(tiny.model)
    with pytest.raises(CourseError, match=re.escape(says)):
        wrong(model)
    assert all(weight.requires_grad for weight in model.parameters())
    assert count_parameters(model) == count_parameters(tiny.model)


@pytest.mark.parametrize(
    "ask",
    [
        *(remove_adapters, prefix.remove_virtual_tokens, norms, feedforward_modules),
        *(prefix.size_of, prefix.attention_layers),
    ],
)
def test_a_base_in_the_place_of_its_model_is_named(ask, tiny):
    with pytest.raises(CourseError, match="found a Loaded, expected a model, such as base.model"):
        ask(tiny)
