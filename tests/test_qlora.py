"""Tests of course_lib.qlora: bytes and numbers are those of bitsandbytes, gradients those of the
dequantised weight, and a merge changes no answer.
"""

import copy
import gc
import math
import weakref
from statistics import NormalDist

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from course_lib import lora, memory, models, qlora, surgery
from course_lib.qlora import (
    PackedLinear,
    dequantize_blockwise,
    dequantized_copy,
    dynamic_levels,
    even_levels,
    fp4_levels,
    lloyd_max_levels,
    nearest_codes,
    nf4_levels,
    pack,
    quantize_blockwise,
    quantize_constants,
    quantize_layers,
    round_to_range,
    unpack,
)
from course_lib.runtime import CourseError
from tests.fixtures.models import IDS, fresh_tiny, logits, small_gpt2
from tests.fixtures.runs import train

SIZES = (64, 128, 256, 512, 1024, 2048, 4096)  # of blocks
BOOKS = {"nf4": nf4_levels, "fp4": fp4_levels}


def normal(*shape, seed=0, scale=0.05):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def zero_of(levels):
    return nearest_codes(torch.zeros(1), levels).item()


# --- levels: derived, and those of the library


def test_nf4_is_derived_and_equals_the_table_that_ships():
    assert torch.equal(nf4_levels(), bnb.get_4bit_type("nf4", device="cpu"))
    assert math.isclose(qlora.OUTERMOST, 1 - (1 / 30 + 1 / 32) / 2, abs_tol=1e-7)


def test_nf4_has_quantiles_at_equal_steps_of_probability():
    edge = NormalDist().inv_cdf(qlora.OUTERMOST)
    chances = [NormalDist().cdf(level * edge) for level in nf4_levels().tolist()]
    steps = torch.tensor(chances).diff()
    torch.testing.assert_close(steps[:7], steps[:1].expand(7), atol=1e-6, rtol=0)
    torch.testing.assert_close(steps[7:], steps[7:8].expand(8), atol=1e-6, rtol=0)


def test_fp4_and_the_type_of_the_constants_are_those_of_the_library():
    torch.testing.assert_close(
        fp4_levels(), bnb.get_4bit_type("fp4", device="cpu"), atol=1e-7, rtol=0
    )
    assert torch.equal(dynamic_levels(), bnb.create_dynamic_map())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_even_levels_are_symmetric_integers(bits):
    levels = even_levels(bits)
    assert len(levels) == 2**bits - 1
    assert torch.equal(levels, -levels.flip(0))
    torch.testing.assert_close(levels.diff(), levels.diff()[:1].expand(2**bits - 2))


def test_no_levels_have_a_smaller_square_error_than_lloyd_and_max():
    values = normal(200_000, scale=1.0).view(-1, 64)
    values = (values / values.abs().amax(1, keepdim=True)).flatten()
    best = lloyd_max_levels(values)

    def error(levels):
        return (levels[nearest_codes(values, levels).int()] - values).square().mean().item()

    assert error(best) < min(error(book) for book in (nf4_levels(), even_levels()))
    for moved in (best * 1.01, best + 0.005):
        assert error(best) < error(moved)
    pinned = lloyd_max_levels(values, with_zero=True)
    assert 0 in pinned
    assert error(best) < error(pinned) < error(nf4_levels())


# --- quantise and dequantise


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5000),
    st.sampled_from(SIZES),
    st.sampled_from(["nf4", "fp4"]),
    st.integers(0, 1000),
)
def test_packed_bytes_and_dequantised_values_are_those_of_bitsandbytes(n, size, kind, seed):
    values, levels = normal(n, seed=seed), BOOKS[kind]()
    codes, absmax = quantize_blockwise(values, levels, size)
    theirs, state = bnb.quantize_4bit(values, blocksize=size, quant_type=kind)
    packed = pack(codes, zero_of(levels))
    assert (packed != theirs.flatten()).sum() <= 1e-5 * n  # ties
    torch.testing.assert_close(absmax, state.absmax, atol=0, rtol=0)
    if size < 2048:  # from there on bitsandbytes compiles a kernel for each length
        restored = dequantize_blockwise(unpack(theirs.flatten(), n), absmax, levels, size)
        assert torch.equal(restored, bnb.dequantize_4bit(theirs, state).flatten())


@pytest.mark.parametrize("size", SIZES)
def test_a_million_weights_have_the_bytes_of_bitsandbytes(size):
    values = normal(1_000_000)
    theirs, _ = bnb.quantize_4bit(values, blocksize=size, quant_type="nf4")
    packed = pack(quantize_blockwise(values, nf4_levels(), size)[0], 7)
    assert (packed != theirs.flatten()).sum() <= 10


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400), st.integers(1, 100), st.integers(0, 1000))
def test_an_error_is_at_most_half_a_gap_and_the_largest_weight_comes_back(n, size, seed):
    values = normal(n, seed=seed)
    codes, absmax = quantize_blockwise(values, nf4_levels(), size)
    restored = dequantize_blockwise(codes, absmax, nf4_levels(), size)
    of_each = absmax.repeat_interleave(size)[:n] if size <= n else absmax.expand(n)
    half_a_gap = nf4_levels().diff().max() / 2 * of_each
    assert ((restored - values).abs() <= half_a_gap * (1 + 1e-5)).all()
    for start in range(0, n, size):
        block = values[start : start + size]
        place = block.abs().argmax()
        torch.testing.assert_close(restored[start + place], block[place])


def test_what_lies_on_the_grid_comes_back_and_quantising_again_changes_nothing():
    codes, absmax = quantize_blockwise(normal(1000), nf4_levels())
    restored = dequantize_blockwise(codes, absmax, nf4_levels())
    again, absmax_again = quantize_blockwise(restored, nf4_levels())
    assert torch.equal(again, codes)
    assert torch.equal(absmax_again, absmax)


@settings(deadline=None)
@given(st.lists(st.integers(0, 15), max_size=50))
def test_packed_codes_come_back(codes):
    given_codes = torch.tensor(codes, dtype=torch.uint8)
    packed = pack(given_codes)
    assert packed.dtype == torch.uint8
    assert len(packed) == (len(codes) + 1) // 2
    assert torch.equal(unpack(packed, len(codes)), given_codes)


@pytest.mark.parametrize("blocks", [1, 5, 256, 1000, 15_625])
def test_constants_are_within_a_step_of_the_librarys(blocks):
    values = normal(64 * blocks)
    codes, scales, mean = quantize_constants(quantize_blockwise(values, nf4_levels())[1])
    _, state = bnb.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    assert torch.equal(scales, state.state2.absmax)
    assert torch.equal(mean, state.offset)
    restored = qlora.dequantize_constants(codes, scales, mean, dynamic_levels())
    theirs = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    step = scales.repeat_interleave(qlora.CONSTANTS_BLOCK)[:blocks] * dynamic_levels().diff().max()
    assert ((restored - theirs).abs() <= step * (1 + 1e-4)).all()
    # bitsandbytes looks codes up in a table that is a little coarse near the middles
    assert (restored != theirs).float().mean() < 0.01


def test_asymmetric_integers_keep_both_ends_and_are_the_nearest():
    values = normal(6, 64)
    rounded = round_to_range(values)
    for before, after in zip(values, rounded, strict=True):
        torch.testing.assert_close(after.min(), before.min())
        torch.testing.assert_close(after.max(), before.max())
        step = (before.max() - before.min()) / 15
        assert ((after - before).abs() <= step / 2 * (1 + 1e-4)).all()
        assert len(after.unique()) <= 16


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("size", [32, 64, 256])
def test_bits_for_each_weight_are_those_that_are_stored(size, double):
    layer = PackedLinear(normal(512, 512), block_size=size, double=double)
    stored = 8 * memory.stored_bytes(nn.Sequential(layer))["linear layers"]
    once = 8 * (layer.levels.numel() * 4 + (4 if double else 0))  # for the whole matrix
    expected = qlora.bits_per_weight(size, double)
    assert (stored - once) / 512**2 == pytest.approx(expected, rel=1e-6)


# --- layers and models


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("d_in", "d_out"), [(64, 32), (33, 7), (5, 1), (1, 5)])
def test_a_packed_layer_computes_with_the_dequantised_weight(d_in, d_out, bias):
    plain = nn.Linear(d_in, d_out, bias=bias)
    layer = PackedLinear(plain.weight, plain.bias)
    x = normal(3, 4, d_in, scale=1.0).requires_grad_()
    expected = linear(x, layer.dequantized(), plain.bias)
    torch.testing.assert_close(layer(x), expected)
    grad = torch.autograd.grad(expected.square().sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), x)[0], grad)


def test_no_weight_lives_from_the_forward_to_the_backward_pass(monkeypatch):
    layer, made = PackedLinear(normal(64, 256)), []
    dequantized = PackedLinear.dequantized

    def watched(self):
        weight = dequantized(self)
        made.append(weakref.ref(weight.untyped_storage()))
        return weight

    monkeypatch.setattr(PackedLinear, "dequantized", watched)
    x = normal(2, 256).requires_grad_()
    ours, plain = layer(x), linear(x, layer.dequantized())
    gc.collect()
    assert [storage() is None for storage in made] == [True, False]
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), x)[0], torch.autograd.grad(plain.sum(), x)[0]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_it_computes_in_that_type_as_a_linear_layer_does(dtype):
    plain = nn.Linear(64, 32)
    layer = PackedLinear(plain.weight, plain.bias)
    reference = copy.deepcopy(plain)
    reference.weight.data = layer.dequantized()
    x = normal(3, 64, scale=1.0)
    with torch.autocast("cpu", dtype):
        found, expected = layer(x), reference(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0.02)  # the bias is added apart


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_quantised_model_is_frozen_and_all_but_its_head_is_packed(kind):
    model = fresh_tiny().model if kind == "llama" else small_gpt2()
    total = surgery.count_parameters(model).total
    layers = surgery.find_layers(model, surgery.ALL_LINEAR)
    restored = {
        path: dequantize_blockwise(
            *quantize_blockwise(surgery.weight_matrix(layer), nf4_levels()), nf4_levels()
        )
        for path, layer in layers.items()
    }
    quantize_layers(model, double=False)
    assert str(surgery.count_parameters(model)) == f"0 of {total:,} weights train (0.0000%)"
    for path, weight in restored.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, PackedLinear)
        assert torch.equal(layer.dequantized().flatten(), weight)
    assert not isinstance(model.get_output_embeddings(), PackedLinear)
    assert logits(model).isfinite().all()


def test_ours_and_bitsandbytes_give_the_same_logits(machine):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        models.tiny_folder(), dtype=torch.float32, quantization_config=plain, device_map="cpu"
    )
    ours = fresh_tiny().model
    quantize_layers(ours, double=False)
    with torch.no_grad():  # in train mode: otherwise bitsandbytes takes bf16 where a CPU has it
        difference = ours.train()(IDS).logits - theirs.train()(IDS).logits
    assert difference.abs().max() < 1e-5


def test_with_constants_quantised_again_the_models_differ_by_what_few_constants_do(machine):
    ours, theirs = fresh_tiny().model, models.load("tiny", machine, quantize="nf4").model
    whole = logits(ours)
    quantize_layers(ours)
    apart, rounding = (logits(ours) - logits(theirs)).norm(), (logits(ours) - whole).norm()
    assert apart < 0.05 * rounding


def test_lora_on_packed_layers_trains_and_changes_nothing_else(machine):
    base = fresh_tiny()
    quantize_layers(base.model)
    lora.add_lora(base.model, 4, 8, surgery.ALL_LINEAR)
    state = base.model.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    _, run = train(machine, base, steps=12, learning_rate=1e-2)
    assert run.losses[-1] < 0.7 * run.losses[0]
    changed = {
        name
        for name, value in base.model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed == {name for name in before if name.endswith((".A", ".B"))}


def test_ours_trains_as_bitsandbytes_does(machine):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    losses = []
    for own in (True, False):
        base = fresh_tiny()
        if own:
            quantize_layers(base.model, double=False)
        else:
            base.model = AutoModelForCausalLM.from_pretrained(
                models.tiny_folder(),
                dtype=torch.float32,
                quantization_config=config,
                device_map="cpu",
            )
        lora.add_lora(base.model, 4, 8, surgery.ALL_LINEAR)
        losses.append(torch.tensor(train(machine, base, steps=6)[1].losses))
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)


@pytest.fixture(params=["ours", "bitsandbytes"])
def trained(request, machine):
    """A 4-bit base with an adapter that changes something."""
    if request.param == "ours":
        model = fresh_tiny().model
        quantize_layers(model)
    else:
        model = models.load("tiny", machine, quantize="nf4").model
    lora.add_lora(model, 4, 8, surgery.ALL_LINEAR)
    generator = torch.Generator().manual_seed(0)
    for layer in lora.lora_layers(model).values():
        nn.init.normal_(layer.adapters["default"].B, std=0.05, generator=generator)
    return model.eval()


def test_merged_into_the_dequantised_weights_no_answer_changes(trained):
    before = logits(trained)
    merged = lora.merged_copy(dequantized_copy(trained))
    largest = before.abs().max()
    assert (logits(merged) - before).abs().max() < 1e-5 * largest
    assert torch.equal(logits(trained), before)
    assert not surgery.wrapped_layers(merged)
    assert all(weight.requires_grad for weight in merged.parameters())


def test_a_merged_copy_is_saved_and_loaded_as_an_ordinary_model(trained, tmp_path):
    from transformers import AutoModelForCausalLM

    merged = lora.merged_copy(dequantized_copy(trained))
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(loaded.eval()), logits(merged), atol=0, rtol=0)


def test_merged_into_other_weights_or_quantised_again_answers_change(trained):
    before, merged = logits(trained), lora.merged_copy(dequantized_copy(trained))
    quantize_layers(merged)
    assert (logits(merged) - before).abs().max() > 1e-3


def test_a_weight_is_dequantised_whoever_packed_it(trained):
    plain = dequantized_copy(trained)
    for path, layer in lora.lora_layers(trained).items():
        expected = plain.get_submodule(path).base.weight
        assert torch.equal(qlora.dequantized_weight(layer.base), expected)


def test_the_adapter_can_be_taken_off_again(trained):
    lora.use_adapters(trained, {})
    plain = logits(trained)
    lora.remove_lora(trained)
    assert torch.equal(logits(trained), plain)
    assert surgery.count_parameters(trained).trained == 0


def test_its_state_is_saved_in_a_file_and_loaded(tmp_path):
    ours, other = fresh_tiny().model, fresh_tiny().model
    quantize_layers(ours)
    for weight in other.parameters():
        nn.init.normal_(weight, std=0.02)
    quantize_layers(other)
    state = {name: value for name, value in ours.state_dict().items() if name != "lm_head.weight"}
    save_file(state, tmp_path / "packed.safetensors")
    other.load_state_dict(load_file(tmp_path / "packed.safetensors"), strict=False)
    assert torch.equal(logits(other), logits(ours))


def test_layers_share_nothing_with_each_other_or_with_the_caller():
    model, levels = fresh_tiny().model, nf4_levels()
    quantize_layers(model, levels=levels)
    before = logits(model)
    levels.zero_()
    first = model.get_submodule("model.layers.0.mlp.up_proj")
    assert torch.equal(logits(model), before)
    other = model.get_submodule("model.layers.1.mlp.up_proj").levels.clone()
    first.levels.zero_()
    assert torch.equal(model.get_submodule("model.layers.1.mlp.up_proj").levels, other)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_dequantised_copy_shares_no_bias_with_its_model(adapter):
    model = small_gpt2()
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight)
    quantize_layers(model)
    if adapter:
        lora.add_lora(model, 2, 4, surgery.ALL_LINEAR)
    before = logits(model)
    plain = dequantized_copy(model)
    torch.testing.assert_close(logits(plain), before)
    trained = surgery.count_parameters(model).trained
    with torch.no_grad():
        for weight in plain.parameters():
            weight.zero_()
    lora.remove_lora(plain)
    assert torch.equal(logits(model), before)
    assert surgery.count_parameters(model).trained == trained


def test_the_footprint_is_below_a_third_of_float32s():
    model = fresh_tiny().model
    whole = memory.stored_bytes(model)
    quantize_layers(model)
    packed = memory.stored_bytes(model)
    assert packed["embeddings"] == whole["embeddings"]
    assert packed["linear layers"] < 0.14 * whole["linear layers"]
    assert sum(packed.values()) < 0.35 * sum(whole.values())


# --- hostile input


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spoils_its_block_and_no_other(bad):
    values = normal(4, 64)
    values[1, 3] = bad
    restored = dequantize_blockwise(*quantize_blockwise(values, nf4_levels()), nf4_levels())
    restored = restored.view(4, 64)
    assert not restored[1].isfinite().any()
    values[1] = 0
    expected = dequantize_blockwise(*quantize_blockwise(values, nf4_levels()), nf4_levels())
    assert torch.equal(restored[[0, 2, 3]], expected.view(4, 64)[[0, 2, 3]])


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65])
def test_zeros_of_any_length_stay_zeros(n):
    codes, absmax = quantize_blockwise(torch.zeros(n), nf4_levels())
    assert codes.tolist() == [7] * n
    assert torch.equal(dequantize_blockwise(codes, absmax, nf4_levels()), torch.zeros(n))
    assert len(absmax) == math.ceil(n / 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_transposed_half_or_double_tensor_is_quantised_as_its_float32_copy(dtype):
    values = normal(64, 48).to(dtype).T
    found = quantize_blockwise(values, nf4_levels())
    expected = quantize_blockwise(values.float().contiguous(), nf4_levels())
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", [0, -64, 64.0, None, True])
def test_a_block_size_that_is_none_is_refused(size):
    with pytest.raises(CourseError, match="block_size=.* must be a whole number above 0, such as"):
        quantize_blockwise(torch.ones(64), nf4_levels(), size)


def test_a_block_larger_than_all_is_one_block():
    codes, absmax = quantize_blockwise(normal(100), nf4_levels(), 10**12)
    assert len(absmax) == 1
    assert len(dequantize_blockwise(codes, absmax, nf4_levels(), 10**12)) == 100


@pytest.mark.parametrize("size", [32, 100])
def test_another_block_size_than_that_of_the_codes_is_refused(size):
    codes, absmax = quantize_blockwise(normal(200), nf4_levels(), 64)
    with pytest.raises(CourseError, match=f"200 codes in blocks of {size} have . absmax, found 4"):
        dequantize_blockwise(codes, absmax, nf4_levels(), size)


@pytest.mark.parametrize("bits", [1, 9, 4.0, None])
def test_even_levels_of_bits_that_no_code_has_are_refused(bits):
    with pytest.raises(CourseError, match="must be a whole number in 2..8"):
        even_levels(bits)


def test_more_levels_than_a_byte_has_are_refused():
    with pytest.raises(CourseError, match="found 257 levels, at most 256 have a code of one byte"):
        nearest_codes(torch.zeros(3), torch.linspace(-1, 1, 257))


def test_whole_numbers_are_refused():
    with pytest.raises(CourseError, match=r"found torch.int64 values, expected floating-point"):
        quantize_blockwise(torch.ones(4, dtype=torch.int64), nf4_levels())


def refused(action, model, message):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CourseError, match=message):
        action()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_quantising_twice_or_under_an_adapter_is_refused():
    model = fresh_tiny().model
    lora.add_lora(model, 4, 8, ["q_proj"])
    message = "q_proj is a LoRALinear already: quantise first, then add the adapter"
    refused(lambda: quantize_layers(model, ["q_proj"]), model, message)
    lora.remove_lora(model)
    quantize_layers(model, ["q_proj"])
    refused(
        lambda: quantize_layers(model),
        model,
        "q_proj is quantised already: leave it out of targets",
    )


def test_a_model_with_a_weight_that_is_not_finite_is_refused_and_stays():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    nn.init.constant_(model[1].weight, math.inf)
    message = "1 has a weight that is not finite: load the base again"
    refused(lambda: quantize_layers(model), model, message)
    assert type(model[0]) is nn.Linear


def test_merging_into_codes_is_refused_and_says_what_to_do(trained):
    refused(
        lambda: lora.merged_copy(trained), trained, r"take qlora.dequantized_copy\(model\) first"
    )


def test_a_model_without_codes_has_nothing_to_dequantise(tiny):
    with pytest.raises(CourseError, match="no quantised layer: it can be merged as it is"):
        dequantized_copy(tiny.model)


def test_more_levels_than_four_bits_hold_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(
        CourseError, match=r"found 31 levels, expected a tensor of 1 to 16 finite numbers"
    ):
        quantize_layers(model, levels=even_levels(5))
    assert isinstance(model[0], nn.Linear)
    assert not isinstance(model[0], PackedLinear)


@pytest.mark.parametrize(
    "levels", [[-1.0, 0.0, 1.0], "nf4", torch.empty(0), torch.tensor([math.nan]), torch.ones(2, 2)]
)
def test_levels_that_are_none_are_refused(levels):
    model = fresh_tiny().model
    refused(lambda: quantize_layers(model, levels=levels), model, "expected a tensor of 1 to 16")


def test_levels_in_another_type_are_taken_as_float32():
    one, other = fresh_tiny().model, fresh_tiny().model
    quantize_layers(one)
    quantize_layers(other, levels=nf4_levels().double())
    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize(
    "action", [quantize_layers, dequantized_copy, lora.merged_copy, memory.stored_bytes]
)
def test_a_base_in_the_place_of_its_model_is_named(action):
    with pytest.raises(CourseError, match="found a Loaded, expected a model, such as base.model"):
        action(fresh_tiny())


def test_a_layer_in_two_places_is_refused():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    message = "0 shares its weight with another layer, .*: take it out of targets"
    refused(lambda: quantize_layers(model), model, message)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_no_cast_of_a_model_touches_its_packed_weights(cast):
    for double in (False, True):
        layer = PackedLinear(normal(4, 64), torch.ones(4), double=double)
        weight = layer.dequantized()
        model = cast(nn.Sequential(layer))
        assert torch.equal(layer.dequantized(), weight)
        x = torch.ones(1, 64, dtype=layer.bias.dtype)
        torch.testing.assert_close(model(x), linear(x, weight.to(x.dtype), layer.bias))
        assert torch.equal(model.float()[0].dequantized(), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_in_half_precision_is_packed_and_its_copies_are_float32(dtype, machine):
    model = models.load("tiny", machine, dtype=dtype).model
    quantize_layers(model)
    lora.add_lora(model, 4, 8, ["q_proj"])
    assert logits(model).isfinite().all()
    for plain in (dequantized_copy(model), lora.merged_copy(dequantized_copy(model))):
        assert logits(plain).isfinite().all()
        assert {weight.dtype for weight in plain.parameters()} == {torch.float32}


def test_a_packed_model_is_not_saved_under_names_that_no_model_reads(tmp_path):
    model = fresh_tiny().model
    quantize_layers(model)
    lora.add_lora(model, 4, 8, ["q_proj"])
    for _ in range(2):
        with pytest.raises(CourseError, match="dequantized_copy"):
            model.save_pretrained(tmp_path)
        lora.remove_lora(model)
    dequantized_copy(model).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_t5_computes_with_packed_layers_as_with_dequantised_ones():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=50, decoder_start_token_id=0, **sizes)
    ).eval()
    quantize_layers(model)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = dequantized_copy(model)(input_ids=ids, decoder_input_ids=ids).logits
        found = model(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(found, expected)


def test_levels_are_fitted_to_any_values_but_none():
    fitted = lloyd_max_levels(normal(64, 64).half())
    assert (fitted.diff() > 0).all()
    assert lloyd_max_levels(torch.tensor([0.0, 1.0]), count=4).isfinite().all()
    with pytest.raises(CourseError, match="found no values"):
        lloyd_max_levels(torch.empty(0))


def test_a_layer_of_gpt2_is_packed_the_right_way_round():
    layer = Conv1D(6, 4)  # (4, 6), transposed
    model = nn.Sequential(layer)
    quantize_layers(model, double=False)
    torch.testing.assert_close(model[0].dequantized(), layer.weight.T, atol=0.01, rtol=0.2)
    assert (model[0].in_features, model[0].out_features) == (4, 6)
