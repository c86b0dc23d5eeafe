"""Tests of course_lib.dryrun: what shapes say is what real models keep."""

import pytest
import torch
from transformers import AutoConfig

from course_lib import adalora, dryrun, lora, memory, surgery
from course_lib.runtime import CourseError

ALL = surgery.ALL_LINEAR


def kept_by(model, autocast=None):
    """Bytes for each token that a real model keeps, of a padded batch."""
    ids = torch.randint(5, 300, (2, 48), generator=torch.Generator().manual_seed(0))
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


@pytest.mark.parametrize(
    ("method", "size", "trained"),
    [
        # tiny has 4 blocks of width 128, as wide for keys and values
        ("prompt", 20, 20 * 128),
        ("prefix", 20, 4 * 2 * 128 * 20),
        ("ia3", 0, 4 * (2 * 128 + 384)),
        ("adapter", 16, 4 * 2 * (2 * 16 * 128 + 16 + 128)),
        ("norms", 0, (2 * 4 + 1) * 128),
    ],
)
def test_methods_that_are_counted_train_as_many_weights_as_their_formula_says(
    tiny, method, size, trained
):
    config = tiny.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads) == (4, 128, 4)
    assert config.intermediate_size == 384
    shape = dryrun.shape_of("tiny", method, size, ALL, torch.float32, None, True)
    assert sum(shape.trained) + shape.trained_outside == trained
    assert all(count > 0 for count in shape.kept)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "phi3", "gemma2", "olmo2", "gpt_neox"])
def test_any_dense_family_is_counted(family, tmp_path):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    shape = dryrun.shape_of(str(tmp_path), "lora", 8, ALL, torch.float16, torch.float16, True)
    assert min(shape.kept) > 0
    assert len(set(shape.inputs)) == 1


def test_a_model_that_routes_tokens_is_refused_in_one_line(tmp_path):
    AutoConfig.for_model("mixtral", num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(CourseError, match="cannot run on shapes alone .*blocks are dense") as error:
        dryrun.shape_of(str(tmp_path), "full", 0, ALL, torch.float32, None, True)
    assert "\n" not in str(error.value)
