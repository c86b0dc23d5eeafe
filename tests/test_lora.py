"""Tests of course_lib.lora: nothing changes at the start, and everything after it equals peft."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from course_lib import lora
from course_lib.adapter_files import load_adapter, save_adapter
from course_lib.batching import collate, encode, encode_records
from course_lib.checkpoints import CheckpointError
from course_lib.lora import (
    DoRALinear,
    LoRALinear,
    adapter_names,
    add_lora,
    lora_layers,
    merged_copy,
    remove_lora,
    use_adapters,
)
from course_lib.memory import checkpoint_blocks
from course_lib.objective import supervised_loss
from course_lib.runtime import CourseError
from course_lib.surgery import count_parameters
from course_lib.training import finetune
from tests.fixtures.models import adapted, fill, fresh_tiny, logits, small_gpt2
from tests.fixtures.runs import QUIET, RECORDS, train

BASES = {
    "bias": lambda d_in, d_out: nn.Linear(d_in, d_out),
    "no bias": lambda d_in, d_out: nn.Linear(d_in, d_out, bias=False),
    "Conv1D": lambda d_in, d_out: Conv1D(d_out, d_in),
}


def layer_pair(kind, seed, rank_stabilized=False, use_dora=False):
    """A linear layer of a random shape, the rank, and peft's LoRA with alpha 3 over a copy; its A
    and B, and an input.
    """
    generator = torch.Generator().manual_seed(seed)
    d_in, d_out = torch.randint(3, 24, (2,), generator=generator).tolist()
    rank = torch.randint(1, min(d_in, d_out) + 1, (1,), generator=generator).item()
    torch.manual_seed(seed)
    base = BASES[kind](d_in, d_out)
    settings = LoraConfig(
        r=rank,
        lora_alpha=3,
        target_modules=["0"],
        use_rslora=rank_stabilized,
        use_dora=use_dora,
        fan_in_fan_out=kind == "Conv1D",
    )
    theirs = get_peft_model(nn.Sequential(copy.deepcopy(base)), settings)
    (module,) = (module for module in theirs.modules() if hasattr(module, "lora_A"))
    torch.nn.init.normal_(module.lora_B["default"].weight)
    x = torch.randn(2, 5, d_in, generator=generator)
    return base, rank, theirs, module.lora_A["default"].weight, module.lora_B["default"].weight, x


def output_and_gradients(model, x, *weights):
    x = x.clone().requires_grad_(True)
    y = model(x)
    y.square().mean().backward()
    return y.detach(), x.grad, *(weight.grad for weight in weights)


# --- identity at the start


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_a_fresh_adapter_changes_no_bit(tiny, targets):
    before = logits(tiny.model)
    add_lora(tiny.model, 8, 16, targets)
    assert torch.equal(logits(tiny.model), before)


def test_a_starts_as_pefts_does_and_b_at_zero():
    layer = LoRALinear(nn.Linear(400, 300), rank=100, alpha=1)
    theirs = get_peft_model(
        nn.Sequential(nn.Linear(400, 300)), LoraConfig(r=100, target_modules=["0"])
    )
    ours, peft = layer.adapters["default"].A, theirs.base_model.model[0].lora_A["default"].weight
    assert ours.abs().max() <= 400**-0.5
    torch.testing.assert_close(ours.std(), peft.std(), rtol=0.02, atol=0)
    assert not layer.adapters["default"].B.any()


# --- agreement with peft


@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("seed", range(5))
def test_outputs_gradients_and_merged_weights_equal_pefts(kind, seed, rank_stabilized):
    base, rank, theirs, A, B, x = layer_pair(kind, seed, rank_stabilized)
    layer = LoRALinear(base, rank, alpha=3, rank_stabilized=rank_stabilized)
    update = layer.adapters["default"]
    update.load_state_dict({"A": A, "B": B})
    expected = output_and_gradients(theirs, x, A, B)
    torch.testing.assert_close(
        output_and_gradients(layer, x, update.A, update.B), expected, atol=1e-5, rtol=1e-5
    )
    merged, merged_peft = merged_copy(nn.Sequential(layer))[0], theirs.merge_and_unload()[0]
    assert type(merged) is type(base)
    torch.testing.assert_close(merged.weight, merged_peft.weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bias", "no bias", "Conv1D"])
def test_dora_equals_pefts(kind):
    for seed in range(5):
        base, rank, theirs, A, B, x = layer_pair(kind, seed, use_dora=True)
        layer = DoRALinear(base, rank, alpha=3)
        torch.testing.assert_close(layer(x), base(x))  # at the start, with B = 0
        layer.update.load_state_dict({"A": A, "B": B})
        (m,) = (weight for name, weight in theirs.named_parameters() if "magnitude" in name)
        expected = output_and_gradients(theirs, x, A, B, m)
        found = output_and_gradients(layer, x, layer.update.A, layer.update.B, layer.m)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_over_a_base_of_half_precision_the_update_is_float32_as_in_peft(dtype):
    base, rank, theirs, A, B, x = layer_pair("bias", seed=1)
    layer = LoRALinear(base.to(dtype), rank, alpha=3)
    layer.adapters["default"].load_state_dict({"A": A, "B": B})
    theirs.base_model.model[0].base_layer.to(dtype)
    assert {weight.dtype for weight in layer.parameters() if weight.requires_grad} == {
        torch.float32
    }
    assert torch.equal(layer(x.to(dtype)), theirs(x.to(dtype)))
    assert layer(x.to(dtype)).dtype == dtype


def test_under_autocast_to_fp16_it_computes_what_peft_computes():
    base, rank, theirs, A, B, x = layer_pair("bias", seed=2)
    layer = LoRALinear(base, rank, alpha=3)
    layer.adapters["default"].load_state_dict({"A": A, "B": B})
    with torch.autocast("cpu", dtype=torch.float16):
        torch.testing.assert_close(layer(x), theirs(x), atol=1e-2, rtol=1e-2)


def test_finetuning_takes_the_steps_that_peft_takes(machine, tmp_path):
    ours, theirs = fresh_tiny(), fresh_tiny()
    add_lora(ours.model, 4, 8, "all-linear")
    save_adapter(ours.model, tmp_path / "start")
    theirs.model = PeftModel.from_pretrained(theirs.model, tmp_path / "start", is_trainable=True)
    run, expected = (
        train(machine, base, steps=5, learning_rate=1e-2, progress=False)[1]
        for base in (ours, theirs)
    )
    assert run.losses[-1] < 0.6 * run.losses[0]
    assert run.losses == pytest.approx(expected.losses, abs=1e-5)
    torch.testing.assert_close(logits(ours.model), logits(theirs.model), atol=1e-3, rtol=0)


def test_gradients_are_those_of_finite_differences():
    layer = LoRALinear(nn.Linear(4, 3), rank=2, alpha=3).double()
    nn.init.normal_(layer.adapters["default"].B)
    update = layer.adapters["default"]
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, A, B: torch.func.functional_call(
            layer, {"adapters.default.A": A, "adapters.default.B": B}, x
        ),
        (x, update.A.detach().requires_grad_(True), update.B.detach().requires_grad_(True)),
    )


# --- the mathematical property


@pytest.mark.parametrize("model", [lambda: fresh_tiny().model, small_gpt2], ids=["llama", "gpt2"])
def test_a_merged_copy_computes_the_same_and_has_no_trace_of_lora(model):
    plain = model()
    model = adapted(model())
    before = copy.deepcopy(model.state_dict())
    merged = merged_copy(model)
    assert (logits(model) - logits(plain)).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=0)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert all(weight.requires_grad for weight in merged.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("rank", [1, 3])
def test_the_update_has_the_rank_that_was_asked_for(rank):
    layer = LoRALinear(nn.Linear(9, 7), rank, alpha=2)
    nn.init.normal_(layer.adapters["default"].B)
    assert torch.linalg.matrix_rank(layer.delta()) == rank


def test_switching_and_switching_off(tiny):
    base = logits(tiny.model)
    add_lora(tiny.model, 2, 4, ["q_proj"], name="one")
    fill(tiny.model, 1, "one")
    one = logits(tiny.model)
    add_lora(tiny.model, 3, 4, "all-linear", name="two", rank_stabilized=True)
    assert torch.equal(logits(tiny.model), base)  # the new one is in use, and fresh
    fill(tiny.model, 2, "two")
    two = logits(tiny.model)
    assert lora.adapter_names(tiny.model) == ["one", "two"]
    for choice, expected in (("one", one), ("two", two), ({}, base), ({"one": 1.0}, one)):
        use_adapters(tiny.model, choice)
        assert torch.equal(logits(tiny.model), expected)
    assert not torch.equal(one, two)


def test_a_blend_is_the_weighted_sum_of_the_updates(tiny):
    plain = copy.deepcopy(tiny.model)
    for seed, name in enumerate(("one", "two")):
        add_lora(tiny.model, 2 + seed, 4, ["q_proj", "down_proj"], name=name, seed=seed)
        fill(tiny.model, seed, name)
    use_adapters(tiny.model, {"one": 0.25, "two": -0.5})
    for path, layer in lora_layers(tiny.model).items():
        one, two = layer.adapters["one"], layer.adapters["two"]
        plain.get_submodule(path).weight.data += (
            0.25 * (4 / 2) * one.B @ one.A - 0.5 * (4 / 3) * two.B @ two.A
        )
    torch.testing.assert_close(logits(tiny.model), logits(plain), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(merged_copy(tiny.model)), logits(plain), atol=1e-4, rtol=0)


# --- what stays untouched


def test_a_refused_layer_is_not_frozen():
    base = nn.Linear(4, 4)
    with pytest.raises(CourseError, match="rank=9"):
        LoRALinear(base, rank=9, alpha=4)
    assert all(weight.requires_grad for weight in base.parameters())


def test_only_a_and_b_train(machine):
    base = fresh_tiny()
    add_lora(base.model, 4, 8)
    before = copy.deepcopy(base.model.state_dict())
    train(machine, base, steps=2, progress=False)
    changed = {
        name
        for name, weight in base.model.state_dict().items()
        if not torch.equal(weight, before[name])
    }
    assert changed == {name for name in before if name.endswith(("default.A", "default.B"))}


def test_an_adapter_that_is_not_in_use_does_not_train(machine):
    base = fresh_tiny()
    add_lora(base.model, 4, 8, name="one")
    fill(base.model, name="one")
    add_lora(base.model, 4, 8, name="two")
    before = copy.deepcopy(base.model.state_dict())
    train(machine, base, steps=2, progress=False)
    changed = {
        name
        for name, weight in base.model.state_dict().items()
        if not torch.equal(weight, before[name])
    }
    assert changed == {name for name in before if ".two." in name}


def test_a_run_with_lora_resumes_where_it_stopped(machine, tmp_path):
    examples = encode_records(RECORDS, fresh_tiny().tokenizer, max_tokens=1000).examples

    def run(steps_done):
        base = fresh_tiny()
        add_lora(base.model, 4, 8)
        options = {
            "steps": 4,
            "batch_size": 2,
            "learning_rate": 1e-2,
            "say": QUIET,
            "progress": False,
        }
        outcome = finetune(
            base, examples, machine, folder=tmp_path / steps_done, save_every=2, **options
        )
        return base.model, outcome

    unbroken, _ = run("unbroken")
    (tmp_path / "broken").mkdir()
    (tmp_path / "unbroken" / "checkpoint-2").rename(tmp_path / "broken" / "checkpoint-2")
    resumed, outcome = run("broken")
    assert outcome.resumed_at == 2
    assert torch.equal(logits(resumed), logits(unbroken))


def test_a_run_does_not_go_on_from_the_checkpoint_of_another_adapter(machine, tmp_path):
    base = fresh_tiny()
    for name, alpha in (("one", 8), ("two", 8), ("three", 16)):
        add_lora(base.model, 4, alpha, name=name)
    options = {"steps": 1, "folder": tmp_path, "save_every": 1, "progress": False}
    use_adapters(base.model, "one")
    train(machine, base, **options)
    assert train(machine, base, **options)[1].resumed_at == 1
    for choice in ("two", "three", {"one": 0.5}):
        use_adapters(base.model, choice)
        with pytest.raises(CheckpointError, match="is of another run .trained weights"):
            train(machine, base, **options)


def test_the_seed_decides_a_and_the_global_generator_stays():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, same, other = (adapted(seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    name = "model.layers.0.self_attn.q_proj.adapters.default.A"
    assert torch.equal(first[name], same[name])
    assert not torch.equal(first[name], other[name])


def test_lora_trains_with_checkpointed_activations(tiny, records):
    batch = collate(
        [encode(record, tiny.tokenizer) for record in records], tiny.tokenizer.pad_token_id
    )
    model = adapted(tiny.model).train()

    def gradients():
        model.zero_grad()
        supervised_loss(model, batch).backward()
        return [weight.grad for weight in model.parameters() if weight.requires_grad]

    expected = gradients()
    checkpoint_blocks(model, 3)
    torch.testing.assert_close(gradients(), expected, atol=1e-6, rtol=0)


def test_a_changed_alpha_is_the_one_that_computes_merges_and_is_saved(tmp_path, tiny):
    model = adapted(targets=["q_proj"])
    for layer in lora_layers(model).values():
        layer.adapters["default"].alpha = 40
    torch.testing.assert_close(logits(merged_copy(model)), logits(model), atol=1e-4, rtol=0)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(tiny.model, tmp_path / "adapter")
    assert torch.equal(logits(tiny.model), logits(model))


def test_an_adapter_trains_over_a_4_bit_layer():
    from bitsandbytes.nn import Linear4bit

    model = nn.Sequential(Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)).to(
        "cpu"
    )
    plain = model[0](torch.ones(1, 64))
    add_lora(model, 2, 4, ["0"])
    assert torch.equal(model(torch.ones(1, 64)), plain)
    model(torch.ones(1, 64)).sum().backward()
    assert model[0].adapters["default"].B.grad.any()


# --- hostile input; more of it is in tests/faults


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training", 3])
def test_a_name_that_torch_cannot_keep_is_refused(tiny, name):
    with pytest.raises(CourseError, match="cannot be called .*choose another word"):
        add_lora(tiny.model, 2, 4, name=name)


def test_another_methods_layer_is_refused():
    model = nn.Sequential(DoRALinear(nn.Linear(4, 4), 2, 4))
    with pytest.raises(CourseError, match="0 is a DoRALinear already"):
        add_lora(model, 2, 4, ["0"])


def test_a_head_that_is_the_embedding_is_refused(tiny):
    with pytest.raises(
        CourseError,
        match="lm_head shares its weight with another layer, as a head with the embeddings",
    ):
        add_lora(tiny.model, 2, 4, ["q_proj", "lm_head"])


@pytest.mark.parametrize("weight", [float("nan"), "0.5", None])
def test_a_weight_of_a_blend_must_be_a_number(weight, tiny):
    add_lora(tiny.model, 2, 4, name="one")
    with pytest.raises(CourseError, match="the weight of adapter 'one'"):
        use_adapters(tiny.model, {"one": weight})


def shared_under_two_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(model[0])
    return model


def two_layers_of_one_weight():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("model", [shared_under_two_names, two_layers_of_one_weight])
def test_a_layer_that_a_merge_would_change_elsewhere_is_refused(model):
    model = model()
    with pytest.raises(CourseError, match="0 shares its weight with another layer"):
        add_lora(model, 2, 4, ["0"])
    assert all(weight.requires_grad for weight in model.parameters())


def test_blocks_that_are_used_twice_are_adapted_once_and_merge():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU())] * 2)
    add_lora(model, 2, 4, "all-linear")
    fill(model)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(merged_copy(model)(x), model(x))


# --- adapters that go, compiled models, other families


def test_a_cell_that_removes_and_adds_can_run_twice():
    model = fresh_tiny().model
    before, names = logits(model), [name for name, _ in model.named_parameters()]
    for _ in range(2):
        remove_lora(model)
        add_lora(model, 4, 8)
        fill(model)
    assert not torch.equal(logits(model), before)
    remove_lora(model)
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(weight.requires_grad for weight in model.parameters())
    assert not lora_layers(model)


def test_one_of_several_adapters_goes_and_the_others_stay():
    model = adapted(adapted(name="one", targets=["q_proj", "k_proj"]), ["q_proj"], name="two")
    use_adapters(model, "one")
    expected = logits(model)
    remove_lora(model, "two")
    assert adapter_names(model) == ["one"]
    assert torch.equal(logits(model), expected)
    with pytest.raises(CourseError, match="adapter 'two' is not known, the model has one"):
        remove_lora(model, "two")
    remove_lora(model, "one")
    assert not lora_layers(model)


def test_what_save_pretrained_would_lose_is_refused(tmp_path):
    model = adapted()
    with pytest.raises(CourseError, match="save_adapter.* keeps the adapter, merged_copy"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    merged = merged_copy(model)
    merged.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-4, rtol=0)
    remove_lora(model)
    model.save_pretrained(tmp_path)


def test_an_update_that_is_too_large_for_fp16_is_not_merged():
    model = fresh_tiny().model.half()
    add_lora(model, 1, 1, ["q_proj"])
    layer = next(iter(lora_layers(model).values()))
    with torch.no_grad():
        layer.adapters["default"].A[:], layer.adapters["default"].B[:] = 300.0, 300.0
    with pytest.raises(CourseError, match="does not fit into torch.float16 with its update"):
        merged_copy(model)


def test_what_is_idle_does_not_train():
    model = adapted(adapted(name="one"), name="two")
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    assert all(".two." in name for name in trained)
    alone = count_parameters(adapted(name="one")).trained
    assert count_parameters(model).trained == alone
    use_adapters(model, {"one": 0.5, "two": 0.5})
    assert count_parameters(model).trained == 2 * alone
    use_adapters(model, {})
    assert count_parameters(model).trained == 0


def test_weights_that_were_frozen_on_purpose_stay_frozen_while_in_use():
    model = adapted(name="one")
    for layer in lora_layers(model).values():
        layer.adapters["one"].A.requires_grad_(False)
    use_adapters(model, "one")
    assert not any(layer.adapters["one"].A.requires_grad for layer in lora_layers(model).values())


@pytest.mark.parametrize("called_before", [False, True])
def test_a_compiled_model_is_adapted_as_the_one_that_was_compiled(called_before):
    model = fresh_tiny().model
    compiled = torch.compile(model, backend="eager")
    if called_before:
        logits(compiled)
    add_lora(compiled, 4, 8)
    fill(compiled)
    assert all(path.startswith("model.layers.") for path in lora_layers(compiled))
    assert torch.equal(logits(compiled), logits(model))
    assert torch.equal(logits(compiled), logits(adapted(targets=["q_proj", "v_proj"])))
    torch.testing.assert_close(logits(merged_copy(compiled)), logits(model), atol=1e-4, rtol=0)
    remove_lora(compiled)
    assert torch.equal(logits(compiled), logits(fresh_tiny().model))


def test_models_that_read_a_layers_weight_find_it():
    """Gated T5 casts to the dtype of wo.weight before it calls wo."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=32, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).eval()
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids, decoder_input_ids=ids).logits
    add_lora(model, 2, 4, ["wo", "q"])
    after = model(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    layer = next(iter(lora_layers(model).values()))
    assert layer.weight is layer.base.weight
    assert layer.bias is None


def test_a_base_in_place_of_its_model_is_named(tiny):
    with pytest.raises(CourseError, match="found a Loaded, expected a model, such as base.model"):
        add_lora(tiny, 4, 8)
