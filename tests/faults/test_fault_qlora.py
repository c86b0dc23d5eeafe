"""Faults of QLoRA: weights that are not finite, layers that are wrapped or packed already, merging
into codes, memory that does not suffice, training that runs off.
"""

import math

import pytest
import torch

from course_lib import lora
from course_lib.qlora import (
    PackedLinear,
    dequantized_copy,
    even_levels,
    nf4_levels,
    quantize_blockwise,
    quantize_layers,
)
from course_lib.runtime import CourseError, TrainingError
from tests.fixtures.models import fresh_tiny
from tests.fixtures.runs import same_weights, train


def refused(action, model, message):
    """How a fault is said, and which tensors of the model are not as they were."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CourseError, match=message) as stop:
        action()
    now = model.state_dict()
    assert now.keys() == before.keys()
    lost = [name for name, value in before.items() if not torch.equal(now[name], value)]
    return {"said": stop.value, "lost": lost}


@pytest.mark.fault("D4.1", "quantize_layers of a model whose weight holds {what}")
@pytest.mark.parametrize("what", ["NaN", "inf"])
def test_a_base_that_is_not_finite_is_refused(what, survived):
    model = fresh_tiny().model
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    with torch.no_grad():
        layer.weight[3, 4] = {"NaN": math.nan, "inf": math.inf}[what]
    said = "model.layers.1.mlp.up_proj has a weight that is not finite: load the base again"
    with pytest.raises(CourseError, match=said) as stop:
        quantize_layers(model)
    packed = [name for name, one in model.named_modules() if isinstance(one, PackedLinear)]
    survived(said=stop.value, lost=packed)


@pytest.mark.fault("D4.2", "quantize_layers {what}")
@pytest.mark.parametrize("what", ["twice", "under an adapter"])
def test_what_cannot_be_packed_is_refused(what, survived):
    model = fresh_tiny().model
    if what == "twice":
        quantize_layers(model)
        message = "is quantised already: leave it out of targets"
    else:
        lora.add_lora(model, 4, 8, ["q_proj"])
        message = "is a LoRALinear already: quantise first, then add the adapter"
    survived(**refused(lambda: quantize_layers(model), model, message))


@pytest.mark.fault("D4.3", "a block size of {size!r}")
@pytest.mark.parametrize("size", [0, -64, 64.0, None])
def test_a_block_size_that_is_none_is_refused(size, survived):
    model = fresh_tiny().model
    message = "block_size=.* must be a whole number above 0, such as 64"
    survived(**refused(lambda: quantize_layers(model, block_size=size), model, message))


@pytest.mark.fault("D4.4", "levels for five bits")
def test_levels_that_four_bits_cannot_hold_are_refused(survived):
    model = fresh_tiny().model
    message = "found 31 levels, expected a tensor of 1 to 16 finite numbers"
    survived(**refused(lambda: quantize_layers(model, levels=even_levels(5)), model, message))


@pytest.mark.fault("D4.5", "merging an adapter into packed weights")
def test_merging_into_codes_is_refused_and_the_way_is_named(survived):
    model = fresh_tiny().model
    quantize_layers(model)
    lora.add_lora(model, 4, 8, ["q_proj"])
    message = r"take qlora.dequantized_copy\(model\) first"
    survived(**refused(lambda: lora.merged_copy(model), model, message))


@pytest.mark.fault("D4.6", "dequantized_copy of a model that is not quantised")
def test_there_is_nothing_to_dequantise(survived):
    model = fresh_tiny().model
    survived(**refused(lambda: dequantized_copy(model), model, "no quantised layer"))


@pytest.mark.fault("D4.7", "a 4-bit base is trained without an adapter")
def test_codes_alone_do_not_train(machine, survived):
    base = fresh_tiny()
    quantize_layers(base.model)
    message = "nothing would be trained: add an adapter"
    survived(**refused(lambda: train(machine, base), base.model, message))


@pytest.mark.fault("F17", "QLoRA runs off: its losses are not finite")
def test_a_run_on_packed_weights_that_runs_off_is_stopped(machine, survived):
    base = fresh_tiny()
    quantize_layers(base.model)
    lora.add_lora(base.model, 4, 8, ["q_proj"])
    packed = base.model.get_submodule("model.layers.0.mlp.up_proj")
    before = packed.weight.clone()
    with torch.no_grad():
        packed.scales.view(torch.float32).fill_(math.nan)
    with pytest.raises(TrainingError) as stop:
        train(machine, base)
    survived(said=stop.value, lost=[] if torch.equal(packed.weight, before) else ["codes"])


@pytest.mark.fault("F32", "quantize_blockwise of {what}")
@pytest.mark.parametrize(
    "what", ["an empty tensor", "an odd length", "NaN", "inf", "zeros", "a transposed tensor"]
)
def test_odd_tensors_have_the_documented_result(what, survived):
    tensor = {
        "an empty tensor": torch.empty(0),
        "an odd length": torch.ones(65),
        "NaN": torch.tensor([math.nan] * 64 + [1.0] * 64),
        "inf": torch.tensor([math.inf] * 64 + [1.0] * 64),
        "zeros": torch.zeros(64),
        "a transposed tensor": torch.ones(3, 4).T,
    }[what]
    codes, absmax = quantize_blockwise(tensor, nf4_levels())
    finite = absmax[absmax.isfinite()]
    said = f"{len(codes)} codes; absmax of {len(finite)} of {len(absmax)} blocks finite"
    expected = {
        "an empty tensor": "0 codes; absmax of 0 of 0 blocks finite",
        "an odd length": "65 codes; absmax of 2 of 2 blocks finite",
        "NaN": "128 codes; absmax of 1 of 2 blocks finite",
        "inf": "128 codes; absmax of 1 of 2 blocks finite",
        "zeros": "64 codes; absmax of 1 of 1 blocks finite",
        "a transposed tensor": "12 codes; absmax of 1 of 1 blocks finite",
    }[what]
    assert said == expected
    survived(said=said, lost=[])


@pytest.mark.fault("F9", "a run on our packed weights goes on from its checkpoint")
def test_a_run_on_packed_weights_goes_on_where_it_stopped(machine, tmp_path, survived):
    def run(folder):
        base = fresh_tiny()
        quantize_layers(base.model)
        lora.add_lora(base.model, 4, 8, "all-linear")
        return train(machine, base, steps=4, folder=folder, save_every=2)

    unbroken, _ = run(tmp_path / "unbroken")
    (tmp_path / "broken").mkdir()
    (tmp_path / "unbroken" / "checkpoint-2").rename(tmp_path / "broken" / "checkpoint-2")
    resumed, outcome = run(tmp_path / "broken")
    assert outcome.resumed_at == 2
    lost = [] if same_weights(resumed, unbroken) else ["weights"]
    survived(said="resumed at step 2", lost=lost)
