"""Tests of course_lib.dryrun: what shapes say is what real models keep."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from course_lib import adalora, adapters, dryrun, lora, memory, prefix, surgery
from course_lib.runtime import CourseError

ALL = surgery.ALL_LINEAR
TOKENS = 48  # of a row in `kept_by`


def kept_by(model, autocast=None):
    """Bytes for each token that a real model keeps, of a padded batch."""
    ids = torch.randint(5, 300, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 40:] = 0

    def forward():
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            return model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    return memory.activation_bytes(model.train(), forward)[1] / ids.numel()


def test_full_fine_tuning_keeps_what_the_dry_run_counts(tiny):
    shape = dryrun.shape_of("tiny", "full", 0, ALL, torch.float32, None, True)
    assert sum(shape.kept) + shape.outside == pytest.approx(kept_by(tiny.model), rel=0.05)
    assert shape.base == sum(shape.trained) + shape.trained_outside == tiny.model.num_parameters()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_an_adapter_keeps_what_the_dry_run_counts(tiny, method, autocast):
    dtype = autocast or torch.float32
    tiny.model.to(dtype)
    add = lora.add_lora if method == "lora" else adalora.add_adalora
    add(tiny.model, 8, 8, ALL)
    shape = dryrun.shape_of("tiny", method, 8, ALL, dtype, autocast, True)
    real = kept_by(tiny.model, autocast)
    casts = 2 * (sum(shape.trained) + shape.trained_outside) / 96 if autocast else 0
    assert sum(shape.kept) + shape.outside == pytest.approx(real - casts, rel=0.1)
    assert sum(shape.trained) == surgery.count_parameters(tiny.model).trained


def test_the_inputs_are_what_checkpointed_blocks_keep(tiny):
    memory.checkpoint_blocks(tiny.model, len(memory.blocks_of(tiny.model)))
    shape = dryrun.shape_of("tiny", "full", 0, ALL, torch.float32, None, True)
    real = kept_by(tiny.model)
    assert sum(shape.inputs) + shape.outside == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("method", "size", "add"),
    [
        ("prompt", 20, lambda model: prefix.add_soft_prompt(model, 20)),
        ("prefix", 20, lambda model: prefix.add_prefix(model, 20)),
        ("ia3", 0, adapters.add_ia3),
        ("adapter", 16, lambda model: adapters.add_bottlenecks(model, 16)),
        ("parallel", 16, lambda model: adapters.add_parallel(model, 16)),
        ("bitfit", 0, adapters.train_biases),
        ("norms", 0, adapters.train_norms),
    ],
)
def test_other_methods_keep_what_the_dry_run_counts(tiny, method, size, add, autocast):
    dtype = autocast or torch.float32
    tiny.model.to(dtype)
    add(tiny.model)
    shape = dryrun.shape_of("tiny", method, size, ALL, dtype, autocast, True)
    length = TOKENS + (size if method == "prompt" else 0)
    in_blocks = sum(shape.kept) * length + sum(shape.rows)
    masks = shape.pairs * len(shape.kept) * length * length
    real = TOKENS * kept_by(tiny.model, autocast)
    assert in_blocks + masks + shape.outside * length == pytest.approx(real, rel=0.1)
    trained = surgery.count_parameters(tiny.model).trained
    assert sum(shape.trained) + shape.trained_outside == trained


@pytest.mark.parametrize("size", [10, 200])
def test_a_prefix_costs_each_row_its_keys_and_values(size):
    def shape(length, padded=True):
        return dryrun.shape_of(
            "llama-3.1-8b", "prefix", length, ALL, torch.float16, torch.float16, padded
        )

    heads, width = 32, 128  # with a mask, each head of a query has keys and values of its own
    assert shape(size).rows == (2 * heads * width * size * 2,) * 32
    assert shape(size, padded=False) == shape(size)  # a prefix needs the mask anyway
    assert shape(size).kept[1] - shape(1).kept[1] == 2 * (size - 1)  # the mask's part


def test_without_a_mask_heads_share_their_keys_and_values(tmp_path):
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=320
    )
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 8, 2, 8
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.randint(5, 300, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    real = memory.activation_bytes(
        model, lambda: model(ids, torch.ones_like(ids), use_cache=False).logits
    )[1]
    shapes = [
        dryrun.shape_of(str(tmp_path), "full", 0, ALL, torch.float32, None, padded)
        for padded in (False, True)
    ]
    kept = [sum(shape.kept) + shape.outside for shape in shapes]
    assert kept[0] == pytest.approx(real / TOKENS, rel=0.01)
    assert kept[1] - kept[0] == 2 * 2 * (8 - 2) * 8 * 4  # blocks, keys and values, heads, width


@pytest.mark.parametrize("method", ["prompt", "prefix", "ia3", "adapter", "parallel"])
def test_gpt2_is_counted_with_each_method(method, tmp_path):
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    shape = dryrun.shape_of(str(tmp_path), method, 8, ALL, torch.float16, torch.float16, True)
    assert min(shape.kept) > 0


@pytest.mark.parametrize(
    ("method", "size", "trained"),
    [
        # tiny has 4 blocks of width 128, as wide for keys and values
        ("prompt", 20, 20 * 128),
        ("prefix", 20, 4 * 2 * 128 * 20),
        ("ia3", 0, 4 * (2 * 128 + 384)),
        ("adapter", 16, 4 * 2 * (2 * 16 * 128 + 16 + 128)),
        ("parallel", 16, 4 * (2 * 16 * 128 + 16 + 128)),
        ("bitfit", 0, 4 * (5 * 128 + 2 * 384)),
        ("norms", 0, (2 * 4 + 1) * 128),
    ],
)
def test_methods_train_as_many_weights_as_their_formula_says(tiny, method, size, trained):
    config = tiny.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads) == (4, 128, 4)
    assert config.intermediate_size == 384
    shape = dryrun.shape_of("tiny", method, size, ALL, torch.float32, None, True)
    assert sum(shape.trained) + shape.trained_outside == trained
    assert all(count > 0 for count in shape.kept)


@pytest.mark.parametrize("method", ["full", "norms", "bitfit"])
def test_what_trains_of_the_model_itself_is_not_frozen_as_well(method, tmp_path):
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)  # with biases
    shape = dryrun.shape_of(str(tmp_path), method, 0, ALL, torch.float32, None, True)
    assert shape.frozen + sum(shape.trained) + shape.trained_outside == shape.base


@pytest.mark.parametrize(("method", "size"), [("lora", 8), ("prefix", 20), ("bitfit", 0)])
def test_what_a_method_adds_leaves_the_whole_model_frozen(method, size):
    shape = dryrun.shape_of("tiny", method, size, ALL, torch.float32, None, True)
    assert shape.frozen == shape.base


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "phi3", "olmo2", "gpt_neox"])
def test_any_dense_family_is_counted(family, tmp_path):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    shape = dryrun.shape_of(str(tmp_path), "lora", 8, ALL, torch.float16, torch.float16, True)
    assert min(shape.kept) > 0
    assert len(set(shape.inputs)) == 1


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("prefix", "does not call transformers' attention interface"),
        ("adapter", "it is not known which layers end attention and FFN"),
    ],
)
def test_what_a_method_refuses_is_no_plan(method, message):
    with pytest.raises(CourseError, match=message):
        dryrun.shape_of("falcon-7b", method, 20, ALL, torch.float16, torch.float16, True)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_gpt2_whose_layers_are_conv1d_keeps_what_the_dry_run_counts(autocast, tmp_path):
    config = AutoConfig.for_model("gpt2", n_layer=2, n_embd=64, n_head=4, vocab_size=320)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, name, 0.0)
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config)
    shape = dryrun.shape_of(str(tmp_path), "full", 0, ALL, torch.float32, autocast, True)
    casts = 2 * sum(shape.trained) / 96 if autocast else 0
    assert sum(shape.kept) + shape.outside == pytest.approx(
        kept_by(model, autocast) - casts, rel=0.2
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "bamba"])
def test_a_model_that_is_not_dense_is_refused_in_one_line(family, dtype, tmp_path):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(CourseError, match="only dense blocks are counted") as error:
        dryrun.shape_of(str(tmp_path), "full", 0, ALL, dtype, None, True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["gemma2", "gptj", "mpt", "gpt_neo"])
def test_attention_that_is_not_torchs_is_refused_since_it_keeps_all_pairs(family, tmp_path):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(CourseError, match="does not call torch's attention once a block"):
        dryrun.shape_of(str(tmp_path), "full", 0, ALL, torch.float32, None, True)


def test_pairs_of_tokens_are_counted_for_masks_and_where_no_fused_kernel_takes_the_heads():
    def pairs(model, padded):
        shape = dryrun.shape_of(model, "full", 0, ALL, torch.float16, torch.float16, padded)
        return shape.pairs

    assert pairs("llama-7b", False) == pairs("mistral-7b", False) == 0
    assert pairs("llama-7b", True) == 2
    assert pairs("falcon-7b", False) == 71 * 2


@pytest.mark.parametrize("length", [64, 200])
def test_a_padded_batch_keeps_masks_that_grow_with_the_square(tiny, length):
    ids = torch.randint(5, 300, (4, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, length - 8 :] = 0
    real = memory.activation_bytes(
        tiny.model.train(),
        lambda: tiny.model(input_ids=ids, attention_mask=mask, use_cache=False).logits,
    )[1]
    shape = dryrun.shape_of("tiny", "full", 0, ALL, torch.float32, None, True)
    kept = sum(count + shape.pairs * length for count in shape.kept) + shape.outside
    assert kept * ids.numel() == pytest.approx(real, rel=0.05)
