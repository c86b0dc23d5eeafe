"""Tests of course_lib.surgery: layers found as peft finds them, counts equal to published ones."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    FalconConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    T5Config,
)
from transformers.pytorch_utils import Conv1D

from course_lib import hub, surgery
from course_lib.lora import DoRALinear, add_lora, lora_layers
from course_lib.runtime import CourseError
from course_lib.surgery import (
    count_parameters,
    default_targets,
    empty_model,
    find_layers,
    lora_parameters,
)
from tests.fixtures.models import GPT2, small_gpt2

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = [
    LlamaConfig(**SMALL, intermediate_size=48),
    Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=2),
    PhiConfig(**SMALL, intermediate_size=48),
    GPTNeoXConfig(**SMALL, intermediate_size=48),
    OPTConfig(**SMALL, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32),
    FalconConfig(**SMALL),
    BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    GPT2,
]


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_the_same_layers_are_found_as_by_peft(config, targets):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    settings = LoraConfig(r=2, target_modules=targets, fan_in_fan_out=config.model_type == "gpt2")
    theirs = get_peft_model(copy.deepcopy(model), settings, low_cpu_mem_usage=True)
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A")
    }
    add_lora(model, 2, 4, targets)
    assert lora_layers(model).keys() == adapted
    assert count_parameters(model).trained == sum(
        w.numel() for w in theirs.parameters() if w.requires_grad
    )


@pytest.mark.parametrize(
    "targets", [["0.fc"], ["fc"], ["block.0.fc", "proj"], r"block\.\d\.proj", "all-linear"]
)
def test_names_match_as_in_peft(targets):
    block = nn.ModuleDict({"fc": nn.Linear(4, 4), "proj": nn.Linear(4, 4), "xfc": nn.Linear(4, 4)})
    model = nn.ModuleDict(
        {
            "block": nn.ModuleList([block, copy.deepcopy(block)]),
            "0": nn.ModuleDict({"fc": nn.Linear(4, 4)}),
        }
    )
    theirs = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=targets))
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A")
    }
    assert find_layers(model, targets).keys() == adapted


def test_a_layer_keeps_its_name_when_it_is_wrapped(tiny):
    before = list(surgery.linear_layers(tiny.model))
    add_lora(tiny.model, 2, 4)
    assert list(surgery.linear_layers(tiny.model)) == before
    assert find_layers(tiny.model, ["q_proj", "v_proj"]) == lora_layers(tiny.model)


def test_all_linear_leaves_out_the_output_head(tiny):
    assert surgery.linear_layers(tiny.model).keys() - find_layers(
        tiny.model, "all-linear"
    ).keys() == {"lm_head"}


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["q_prj"], "'q_prj'"),
        (["q_proj", "vproj"], "'vproj'"),
        ("q_proj", "'q_proj'"),
        ([], "no targets"),
        (["self_attn"], "'self_"),
    ],
)
def test_a_target_that_means_no_layer_is_named_with_the_choice(tiny, targets, found):
    with pytest.raises(
        CourseError,
        match=f"{found}.*q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head",
    ):
        find_layers(tiny.model, targets)


def test_gpt2s_transposed_layer_is_a_linear_layer():
    generator = torch.Generator().manual_seed(0)
    layer = find_layers(small_gpt2(), ["c_fc"])["transformer.h.0.mlp.c_fc"]
    x = torch.randn(3, 32, generator=generator)
    assert isinstance(layer, Conv1D)
    assert surgery.layer_shape(layer) == surgery.weight_matrix(layer).shape == (128, 32)
    torch.testing.assert_close(layer(x), x @ surgery.weight_matrix(layer).T + layer.bias)


def test_a_replaced_layer_is_the_one_that_computes():
    model = small_gpt2()
    surgery.replace_layer(model, "transformer.h.1.mlp.c_fc", nn.Linear(32, 128))
    assert isinstance(model.transformer.h[1].mlp.c_fc, nn.Linear)
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 64)


@pytest.mark.parametrize("name", ["transformer.h.9.mlp.c_fc", "transformer.hh"])
def test_a_layer_that_is_not_there_is_not_replaced(name):
    model = small_gpt2()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(CourseError, match=f"no module called '{name}'"):
        surgery.replace_layer(model, name, nn.Identity())
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize(
    "model", [nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4)), nn.Embedding(4, 4)]
)
def test_a_model_without_linear_layers_inside_is_refused_and_not_frozen(model):
    with pytest.raises(
        CourseError,
        match=f"a {type(model).__name__} holds no linear layers: give a model that does",
    ):
        add_lora(model, 2, 4, "all-linear")
    assert all(weight.requires_grad for weight in model.parameters())


# --- default targets


def test_the_two_sources_of_default_targets_disagree_about_phi_alone():
    rows = surgery.target_table()
    assert [row["model type"] for row in rows if row["used"] == "peft; they disagree"] == ["phi"]
    (phi,) = (row for row in rows if row["model type"] == "phi")
    assert (phi["copied table"], phi["peft"]) == ("Wqkv", "q_proj, v_proj, fc1, fc2")
    assert {row["used"] for row in rows} == {"both agree", "table", "peft", "peft; they disagree"}


def test_the_targets_in_use_for_phi_are_in_todays_model_and_those_of_the_table_are_not():
    model = empty_model(FAMILIES[2])
    assert find_layers(model, default_targets(model))
    with pytest.raises(CourseError, match="'Wqkv'"):
        find_layers(model, surgery.COPIED_TARGETS["phi"])


def test_changing_the_default_targets_changes_them_nowhere_else():
    default_targets("llama").append("k_proj")
    default_targets("baichuan").append("k_proj")
    assert (default_targets("llama"), default_targets("baichuan")) == (
        ["q_proj", "v_proj"],
        ["W_pack"],
    )


def test_an_unknown_family_is_told_its_layers():
    model = empty_model(BertConfig(**SMALL, is_decoder=True))
    model.config.model_type = "brand-new"
    with pytest.raises(CourseError, match="'brand-new'.*query, key, value, dense"):
        default_targets(model)
    with pytest.raises(CourseError, match="'brand-new'.*one of baichuan, bloom"):
        default_targets("brand-new")
    with pytest.raises(CourseError, match="no default targets.*of 0"):
        add_lora(nn.Sequential(nn.Linear(2, 2)), 1, 1)


# --- counts


def test_llama_7b_counts_as_alpaca_lora_prints_it():
    model = empty_model(LlamaConfig())  # the defaults are LLaMA-7B's
    add_lora(model, rank=8, alpha=16)
    assert count_parameters(model) == surgery.Count(4_194_304, 6_742_609_920)
    assert str(count_parameters(model)) == "4,194,304 of 6,742,609,920 weights train (0.0622%)"


@pytest.mark.parametrize(
    ("vocabulary", "total"), [(65_024, 6_931_157_888), (65_025, 6_931_162_432)]
)
def test_falcon_7b_counts_as_published_only_with_one_row_more(vocabulary, total):
    config = FalconConfig(
        vocab_size=vocabulary, hidden_size=4544, num_hidden_layers=32, num_attention_heads=71
    )
    model = empty_model(config)
    add_lora(model, rank=32, alpha=16)
    assert count_parameters(model) == surgery.Count(9_437_184, total)


@pytest.mark.parametrize(
    ("matrices", "rank", "weights"),
    [
        (2, 1, 4_718_592),
        (2, 4, 18_874_368),
        (1, 8, 18_874_368),
        (4, 2, 18_874_368),
        (2, 8, 37_748_736),
        (4, 4, 37_748_736),
    ],
)
def test_gpt3_counts_as_in_the_papers_table(matrices, rank, weights):
    assert lora_parameters([(12_288, 12_288)] * matrices * 96, rank) == weights


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_the_formula_counts_what_add_lora_adds(tiny, targets):
    shapes = [
        surgery.layer_shape(layer)
        for layer in find_layers(tiny.model, targets or default_targets(tiny.model)).values()
    ]
    total = count_parameters(tiny.model).total
    add_lora(tiny.model, 4, 8, targets)
    assert count_parameters(tiny.model) == surgery.Count(
        lora_parameters(shapes, 4), total + lora_parameters(shapes, 4)
    )


def test_an_empty_model_has_the_shapes_of_the_real_one(tiny):
    empty = empty_model("tiny")
    assert {name: weight.shape for name, weight in empty.named_parameters()} == {
        name: weight.shape for name, weight in tiny.model.named_parameters()
    }
    assert {weight.device.type for weight in empty.parameters()} == {"meta"}


def test_a_config_that_cannot_be_had_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(hub.HubError, match="HF_HUB_OFFLINE"):
        empty_model("nobody/nothing")


@pytest.mark.parametrize("name", ["../no/such/folder", "tiny ", "a/b/c"])
def test_a_name_that_no_model_can_have_is_one_line(name):
    with pytest.raises(
        CourseError, match=f"the config of '{name}' cannot be used .*: give a transformers config"
    ):
        empty_model(name)


@pytest.mark.parametrize(
    "source", [T5Config(), None, {"hidden_size": 4}], ids=["T5", "None", "dict"]
)
def test_what_makes_no_language_model_is_one_line(source):
    with pytest.raises(
        CourseError,
        match=f"a {type(source).__name__} makes no causal language model .*: give the transformers",
    ):
        empty_model(source)


def test_the_code_of_a_config_is_not_run(tmp_path):
    """A table of default targets leads to such repositories: without being told, transformers asks
    whether to run their code.
    """
    config = {"model_type": "baichuan"}
    config["auto_map"] = {"AutoConfig": "code.Config"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CourseError, match="cannot be used"):
        empty_model(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_model_with_any_wrapped_layer_is_not_saved_under_names_that_nobody_reads(tiny, tmp_path):
    layer = tiny.model.get_submodule("model.layers.0.self_attn.q_proj")
    surgery.replace_layer(tiny.model, "model.layers.0.self_attn.q_proj", DoRALinear(layer, 4, 8))
    with pytest.raises(CourseError, match="cannot be saved by save_pretrained"):
        tiny.model.save_pretrained(tmp_path / "model")
