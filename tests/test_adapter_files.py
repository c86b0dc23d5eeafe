"""Tests of course_lib.adapter_files: adapters of every kind come back from their files, those that
peft knows go to peft and come from it, and what does not fit is refused in one line.
"""

import copy
import json

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from course_lib import adapters, prefix, sealing
from course_lib.adapter_files import CONFIG, FORMAT, WEIGHTS, load_adapter, save_adapter
from course_lib.lora import add_lora
from course_lib.runtime import CourseError
from tests.fixtures.models import IDS, adapted, fresh_tiny, logits, small_gpt2


def grouped():
    """A model with fewer heads for keys than for queries, whose heads are not width / heads."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


BASES = {"llama": lambda: fresh_tiny().model, "gpt2": small_gpt2, "grouped": grouped}
PEFT_HAS = {  # add it here; the config of peft for the same
    "soft prompt": (
        lambda model: prefix.add_soft_prompt(model, 5),
        PromptTuningConfig(num_virtual_tokens=5),
    ),
    "P-tuning, MLP": (
        lambda model: prefix.add_soft_prompt(model, 5, encoder="mlp", hidden=16),
        PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16),
    ),
    "P-tuning, LSTM": (
        lambda model: prefix.add_soft_prompt(model, 5, encoder="lstm", hidden=16),
        PromptEncoderConfig(
            num_virtual_tokens=5, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"
        ),
    ),
    "prefix": (
        lambda model: prefix.add_prefix(model, 5),
        PrefixTuningConfig(num_virtual_tokens=5),
    ),
    "prefix, MLP": (
        lambda model: prefix.add_prefix(model, 5, hidden=16),
        PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16),
    ),
    "IA3": (adapters.add_ia3, IA3Config()),
    "norms": (adapters.train_norms, LNTuningConfig()),
}
OURS = {
    "BOTTLENECK": lambda model: adapters.add_bottlenecks(model, 4),
    "PARALLEL": lambda model: adapters.add_parallel(model, 4, 2.0),
    "MAM": lambda model: adapters.add_mam(model, 5, 4, hidden=16),
    "UNIPELT": lambda model: adapters.add_unipelt(model, 5, 2, 4),
    "BITFIT": adapters.train_biases,
}
ADD = {kind: add for kind, (add, _) in PEFT_HAS.items()} | OURS


def quiet(line):
    """For lines that are expected."""


def with_adapter(kind, base="llama"):
    """A model with an adapter of this kind, as if trained."""
    model = BASES[base]()
    ADD[kind](model)
    return shaken(model)


def shaken(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def with_peft(kind, base="llama"):
    """The same adapter in peft, at its start."""
    settings = copy.deepcopy(PEFT_HAS[kind][1])  # peft writes into it
    settings.task_type = "CAUSAL_LM"
    torch.manual_seed(0)
    return get_peft_model(BASES[base](), settings)


def of_text(found):
    """Without the positions of virtual tokens, which peft keeps."""
    return found[:, -IDS.shape[1] :]


def generated(model):
    return model.generate(
        input_ids=IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
    )


def state(model):
    """All that a load could change."""
    weights = model.named_parameters()
    return {name: (weight.clone(), weight.requires_grad) for name, weight in weights}


def unchanged(model, before):
    after = state(model)
    return before.keys() == after.keys() and all(
        torch.equal(before[name][0], after[name][0]) and before[name][1] == after[name][1]
        for name in before
    )


def edit(folder, **settings):
    """Change the config, as another program would."""
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    (folder / sealing.SEAL).unlink(missing_ok=True)


def edit_weights(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)
    (folder / sealing.SEAL).unlink(missing_ok=True)


# --- there and back


@pytest.mark.parametrize("kind", ADD)
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_an_adapter_comes_back_from_its_files_and_trains_on(tmp_path, kind, base):
    model, again = with_adapter(kind, base), BASES[base]()
    save_adapter(model, tmp_path / "a")
    load_adapter(again, tmp_path / "a", say=quiet)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=0)
    again(input_ids=IDS, labels=IDS).loss.backward()
    trained = [weight for weight in again.parameters() if weight.requires_grad]
    assert trained
    assert all(weight.grad is not None for weight in trained)
    save_adapter(again, tmp_path / "b")
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", PEFT_HAS)
@pytest.mark.parametrize("base", BASES)
def test_peft_reads_what_it_has_and_generates_the_same(tmp_path, kind, base):
    model = with_adapter(kind, base)
    save_adapter(model, tmp_path / "a")
    theirs = PeftModel.from_pretrained(BASES[base](), tmp_path / "a").eval()
    torch.testing.assert_close(of_text(logits(theirs)), logits(model), atol=1e-5, rtol=0)
    assert torch.equal(generated(theirs), generated(model))


@pytest.mark.parametrize("kind", PEFT_HAS)
@pytest.mark.parametrize("base", BASES)
def test_what_peft_saves_is_read_here_and_generates_the_same(tmp_path, kind, base):
    theirs = shaken(with_peft(kind, base)).eval()
    theirs.save_pretrained(tmp_path)
    model, said = BASES[base](), []
    load_adapter(model, tmp_path, say=said.append)
    torch.testing.assert_close(logits(model), of_text(logits(theirs)), atol=1e-5, rtol=1e-5)
    assert torch.equal(generated(model), generated(theirs))
    assert len(said) == (kind in ("P-tuning, MLP", "P-tuning, LSTM", "prefix, MLP"))


@pytest.mark.parametrize("kind", OURS)
def test_peft_refuses_the_kinds_that_it_has_not(tmp_path, kind):
    save_adapter(with_adapter(kind), tmp_path / "a")
    settings = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert (settings["peft_type"], settings["format"]) == (kind, FORMAT)
    with pytest.raises(KeyError, match=kind):
        PeftModel.from_pretrained(fresh_tiny().model, tmp_path / "a")


@pytest.mark.parametrize("kind", ["P-tuning, LSTM", "prefix, MLP", "MAM"])
def test_a_network_is_thrown_away_and_that_is_said(tmp_path, kind):
    model, again, said = with_adapter(kind), fresh_tiny().model, []
    save_adapter(model, tmp_path / "a")
    assert prefix.virtual_tokens(model).network is not None
    load_adapter(again, tmp_path / "a", say=said.append)
    assert prefix.virtual_tokens(again).network is None
    assert [line.partition(f"{tmp_path / 'a'} ")[2] for line in said] == [
        "were made by a network, which files do not keep; they compute the same here, and train "
        "on as a table"
    ]


@pytest.mark.parametrize("kind", ["prefix", "IA3", "BOTTLENECK", "UNIPELT"])
def test_half_the_bits_are_half_the_file(tmp_path, kind):
    model, again = with_adapter(kind), fresh_tiny().model
    save_adapter(model, tmp_path / "a", dtype=torch.float16)
    assert {value.dtype for value in load_file(tmp_path / "a" / WEIGHTS).values()} == {
        torch.float16
    }
    load_adapter(again, tmp_path / "a", say=quiet)
    assert all(w.dtype == torch.float32 for w in again.parameters() if w.requires_grad)
    torch.testing.assert_close(logits(again), logits(model), atol=0.1, rtol=0)


@pytest.mark.parametrize("kind", ADD)
def test_the_generator_of_the_caller_is_left_alone(tmp_path, kind):
    save_adapter(with_adapter(kind), tmp_path / "a")
    model = fresh_tiny().model
    before = torch.get_rng_state()
    load_adapter(model, tmp_path / "a", say=quiet)
    assert torch.equal(torch.get_rng_state(), before)


def test_targets_of_ones_own_are_kept(tmp_path):
    for number, add in enumerate(
        (
            lambda model: adapters.add_bottlenecks(model, 3, ["1.self_attn.o_proj"]),
            lambda model: adapters.add_unipelt(model, 2, 3, 4, ["k_proj", "0.self_attn.q_proj"]),
            lambda model: adapters.add_ia3(model, ["up_proj", "1.mlp.gate_proj"], ["up_proj"]),
        )
    ):
        model, again = fresh_tiny().model, fresh_tiny().model
        add(model)
        save_adapter(shaken(model), tmp_path / str(number))
        load_adapter(again, tmp_path / str(number))
        torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["IA3", "norms"])
def test_a_file_for_a_part_of_its_layers_is_said(tmp_path, kind):
    with_peft(kind).save_pretrained(tmp_path)
    edit_weights(
        tmp_path, lambda weights: [weights.pop(name) for name in [*weights] if ".layers.2." in name]
    )
    said = []
    load_adapter(fresh_tiny().model, tmp_path, say=said.append)
    assert [line.partition("; ")[0].partition(f"{tmp_path} ")[2] for line in said] == [
        "covers a part of the layers that its config names"
    ]


@pytest.mark.parametrize("kind", ADD)
def test_a_removed_adapter_leaves_the_base(tmp_path, kind):
    save_adapter(with_adapter(kind), tmp_path / "a")
    model = fresh_tiny().model
    before = logits(model)
    load_adapter(model, tmp_path / "a", say=quiet)
    assert not torch.allclose(logits(model), before)
    adapters.remove_adapters(model)
    assert torch.equal(logits(model), before)


# --- what is refused


def refused(model, folder, match):
    before = state(model)
    with pytest.raises(CourseError, match=match) as caught:
        load_adapter(model, folder, say=pytest.fail)
    assert "\n" not in str(caught.value)
    assert unchanged(model, before)


@pytest.mark.parametrize("kind", ADD)
def test_another_base_is_refused(tmp_path, kind):
    save_adapter(with_adapter(kind), tmp_path / "a")
    refused(grouped(), tmp_path / "a", r"does not fit|for another base")
    refused(small_gpt2(), tmp_path / "a", r"does not fit|for another base")


@pytest.mark.parametrize("kind", ADD)
def test_what_is_missing_misshapen_or_not_finite_is_refused(tmp_path, kind):
    save_adapter(with_adapter(kind), tmp_path / "a")
    whole = load_file(tmp_path / "a" / WEIGHTS)
    first = min(whole)
    changes = {
        "holds NaN or infinity in": lambda one: one[first].view(-1)[:1].fill_(torch.nan),
        "does not fit|no (linear layer|norm)": lambda one: one.update({first: torch.ones(2, 3, 4)}),
        "no place for|not fit": lambda one: one.update({"base_model.model.x.w": torch.ones(1)}),
        "not plain .*no weights": dict.clear,
    }
    if kind not in ("IA3", "norms"):  # where a part of the layers may be there
        changes |= {"is missing|no place|no weights": lambda one: one.pop(first)}
    for said, change in changes.items():
        save_file(whole, tmp_path / "a" / WEIGHTS)
        edit_weights(tmp_path / "a", change)
        refused(fresh_tiny().model, tmp_path / "a", said)


@pytest.mark.parametrize("kind", ADD)
@pytest.mark.parametrize("there", ["LoRA", "IA3", "prefix", "BITFIT"])
def test_a_model_that_has_an_adapter_gets_no_second(tmp_path, kind, there):
    save_adapter(with_adapter(kind), tmp_path / "a")
    model = adapted() if there == "LoRA" else with_adapter(there)
    refused(model, tmp_path / "a", "the model has an adapter already: remove it")


def test_lora_is_not_loaded_beside_another_kind(adapter_folder):
    for kind in ADD:
        refused(with_adapter(kind), adapter_folder, "the model has an adapter already")


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("prefix", {"peft_type": "LOHA"}, "does not describe an adapter known here: expected a"),
        ("prefix", {"peft_type": ["IA3"]}, "does not describe an adapter known here"),
        ("prefix", {"num_virtual_tokens": "5"}, "num_virtual_tokens='5', expected a positive"),
        ("prefix", {"num_virtual_tokens": 10**12}, "num_virtual_tokens=1000000000000, expected"),
        ("prefix", {"num_virtual_tokens": 6}, r"prompt_embeddings is \(5, 1024\), expected \(6"),
        ("prefix", {"num_transformer_submodules": 2}, "not plain PREFIX_TUNING .num_transformer"),
        ("soft prompt", {"modules_to_save": ["lm_head"]}, "not plain PROMPT_TUNING .modules_to"),
        ("soft prompt", {"peft_type": "PREFIX_TUNING"}, r"is \(5, 128\), expected \(5, 1024\)"),
        ("IA3", {"target_modules": 5}, "not plain IA3 .target_modules=5.: load it with peft"),
        ("IA3", {"modules_to_save": ["norm"]}, "not plain IA3 .modules_to_save"),
        ("norms", {"format": FORMAT}, "not plain LN_TUNING .format='course_lib'"),
        ("MAM", {"format": None}, "not plain MAM .format=None.: get it again"),
        ("MAM", {"scale": "big"}, "scale='big', expected a positive number"),
        ("MAM", {"bottleneck": 2**40}, "bottleneck=1099511627776, expected a positive number"),
        ("BOTTLENECK", {"target_modules": "("}, "target_modules='.', expected names"),
        (
            "BOTTLENECK",
            {"target_modules": ["wing"]},
            "for another base .*no linear layer is called",
        ),
        ("UNIPELT", {"r": True}, "r=True, expected a positive number"),
        (
            "UNIPELT",
            {"bottleneck": 5},
            r"does not fit: .* is \(4, .*expected \(5, ",
        ),
    ],
)
def test_a_config_that_does_not_fit_its_file_is_refused(tmp_path, kind, settings, said):
    save_adapter(with_adapter(kind), tmp_path / "a")
    edit(tmp_path / "a", **settings)
    refused(fresh_tiny().model, tmp_path / "a", said)


@pytest.mark.parametrize("kind", ADD)
def test_a_weight_that_trains_beside_an_adapter_has_no_place_in_its_file(tmp_path, kind):
    model = with_adapter(kind)
    model.model.embed_tokens.weight.requires_grad_(True)
    with pytest.raises(CourseError, match="embed_tokens.weight trains, and a file of kind .* has"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", ADD)
def test_an_adapter_that_is_not_finite_is_not_saved(tmp_path, kind):
    model = with_adapter(kind)
    *_, weight = (weight for weight in model.parameters() if weight.requires_grad)
    with torch.no_grad():
        weight.view(-1)[0] = torch.inf
    with pytest.raises(CourseError, match="is not finite, so it is of no use"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_adapter_of_several_calls_is_not_saved_as_one(tmp_path):
    mixed = fresh_tiny().model
    add_lora(mixed, 2, 4)
    mixed.virtual_tokens = prefix.virtual_tokens(with_adapter("prefix"))
    with pytest.raises(CourseError, match="has LoRA and virtual tokens or adapters, a file only"):
        save_adapter(mixed, tmp_path / "a")
    unequal = with_adapter("PARALLEL")
    next(iter(adapters.beside(unequal).values())).update.scale = 3.0
    with pytest.raises(CourseError, match="the scales of the adapter differ"):
        save_adapter(unequal, tmp_path / "a")
    part = with_adapter("PARALLEL")
    path, one = next(iter(adapters.beside(part).items()))
    part.set_submodule(path, one.base)
    with pytest.raises(CourseError, match="is no plain PARALLEL .*keep the model's state_dict"):
        save_adapter(part, tmp_path / "a")
    assert not (tmp_path / "a").exists()
