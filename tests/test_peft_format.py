"""Tests of course_lib.peft_format: adapters go to peft and come back, damaged or foreign ones are refused in one line."""

import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from course_lib import sealing
from course_lib.lora import add_lora, lora_layers
from course_lib.peft_format import CONFIG, WEIGHTS, load_adapter, save_adapter
from course_lib.runtime import CourseError
from tests.test_lora import adapted, fill, logits
from tests.test_surgery import small_gpt2
from tests.test_training import fresh_tiny

MODELS = {"llama": lambda: fresh_tiny().model, "gpt2": small_gpt2}


@pytest.fixture
def folder(tmp_path):
    """A saved adapter of the tiny model."""
    save_adapter(adapted(targets=["q_proj", "v_proj"]), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("kind", MODELS)
def test_peft_reads_what_is_saved_here(tmp_path, kind, targets, rank_stabilized):
    model = MODELS[kind]()
    add_lora(model, 4, 8, targets, rank_stabilized=rank_stabilized)
    fill(model)
    save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(MODELS[kind](), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=0)
    again = MODELS[kind]()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("kind", MODELS)
def test_what_peft_saves_is_read_here(tmp_path, kind, targets, rank_stabilized):
    options = {"init_lora_weights": False, "lora_dropout": 0.05, "fan_in_fan_out": kind == "gpt2"}
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets, use_rslora=rank_stabilized, **options)
    theirs = get_peft_model(MODELS[kind](), settings).eval()
    theirs.save_pretrained(tmp_path)
    model = MODELS[kind]()
    load_adapter(model, tmp_path, name="theirs")
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=0)


def test_an_adapter_of_single_layers_names_them_whole(tmp_path):
    model = adapted(targets=["layers.1.self_attn.q_proj", "0.mlp.up_proj"])
    save_adapter(model, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert settings["target_modules"] == ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    theirs = PeftModel.from_pretrained(fresh_tiny().model, tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=0)


def test_a_loaded_adapter_stands_beside_others_and_can_be_trained_on(folder):
    model = adapted(name="other")
    load_adapter(model, folder, name="loaded")
    updates = [layer.adapters["loaded"] for layer in lora_layers(model, "loaded").values()]
    assert len(updates) == 2 * model.config.num_hidden_layers
    assert all(weight.requires_grad for update in updates for weight in update.parameters())
    assert all(layer.in_use == {"loaded": 1.0} for layer in lora_layers(model, "loaded").values())


def test_a_saved_adapter_replaces_an_older_one_and_nothing_else(folder):
    model = adapted(targets=["k_proj"])
    save_adapter(model, folder)
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS, sealing.SEAL}
    assert len(load_file(folder / WEIGHTS)) == 2 * model.config.num_hidden_layers
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CourseError, match="holds something else than an adapter"):
        save_adapter(model, folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_written_leaves_the_old_adapter(folder, monkeypatch):
    before = (folder / WEIGHTS).read_bytes()
    monkeypatch.setattr(sealing, "publish", lambda *given: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CourseError, match=r"cannot be written \(.*No space left on device; 0\.\d MB\): choose another folder"):
        save_adapter(adapted(), folder)
    assert (folder / WEIGHTS).read_bytes() == before
    assert os.listdir(folder.parent) == [folder.name]


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(CourseError, match="cannot be written"):
        save_adapter(adapted(), tmp_path / "adapter")
    assert (tmp_path / "adapter").read_text() == "mine"


# --- adapters that cannot be loaded


def edit_settings(folder, **changes):
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(settings | changes))


def edit_weights(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def to_pickle(folder):
    torch.save({}, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
REFUSED = {
    "missing folder": (shutil.rmtree, f"holds no {CONFIG}: give a folder"),
    "missing weights": (lambda folder: (folder / WEIGHTS).unlink(), f"holds no {WEIGHTS}"),
    "pickle": (to_pickle, f"holds a pickle, which can run code.*{WEIGHTS}"),
    "truncated weights": (lambda folder: os.truncate(folder / WEIGHTS, 2000), "damaged"),
    "web page": (lambda folder: (folder / CONFIG).write_text("<html>"), "damaged"),
    "list": (lambda folder: (folder / CONFIG).write_text("[]"), "does not describe LoRA"),
    "no rank": (lambda folder: (folder / CONFIG).write_text('{"peft_type": "LORA"}'), "does not describe LoRA"),
    "another method": (lambda folder: edit_settings(folder, peft_type="IA3"), "does not describe LoRA"),
    "dora": (lambda folder: edit_settings(folder, use_dora=True), r"not plain LoRA \(use_dora\): load it with peft"),
    "pattern": (lambda folder: edit_settings(folder, alpha_pattern={"q_proj": 2}), r"\(alpha_pattern\)"),
    "pissa": (lambda folder: edit_settings(folder, init_lora_weights="pissa"), r"\(init_lora_weights=pissa\)"),
    "full module": (
        lambda folder: edit_weights(folder, lambda weights: weights.update({"base_model.model.lm_head.weight": torch.ones(2)})),
        r"\(base_model.model.lm_head.weight\)",
    ),
    "no tensors": (lambda folder: edit_weights(folder, dict.clear), r"\(no weights\)"),
    "another rank": (lambda folder: edit_settings(folder, r=2), r"A of .*q_proj is \(4, 128\), expected \(2, 128\)"),
    "another width": (
        lambda folder: edit_weights(folder, lambda weights: weights.update({f"{FIRST}B.weight": torch.ones(64, 4)})),
        r"B of model.layers.0.self_attn.q_proj is \(64, 4\), expected \(128, 4\); load the base it was trained on \(.*tiny_llama\)",
    ),
    "half a pair": (lambda folder: edit_weights(folder, lambda weights: weights.pop(f"{FIRST}B.weight")), "B of .* is missing"),
}


@pytest.mark.parametrize("seal", ["sealed", "unsealed"])
@pytest.mark.parametrize("fault", REFUSED)
def test_a_faulty_adapter_is_refused_and_the_model_stays(folder, fault, seal, tiny):
    damage, message = REFUSED[fault]
    damage(folder)
    if seal == "unsealed":  # as peft writes it, so that nothing but the content tells
        (folder / sealing.SEAL).unlink(missing_ok=True)
    by_seal = seal == "sealed" and folder.exists() and (folder / CONFIG).exists() and (folder / WEIGHTS).exists()
    with pytest.raises(CourseError, match="differs from its checksum" if by_seal else message) as caught:
        load_adapter(tiny.model, folder)
    assert "\n" not in str(caught.value)
    assert not lora_layers(tiny.model)
    assert all(weight.requires_grad for weight in tiny.model.parameters())


def test_an_adapter_of_another_architecture_is_refused(folder):
    with pytest.raises(CourseError, match="is for another base .*no linear layer model.layers.0.self_attn.q_proj"):
        load_adapter(small_gpt2(), folder)


def test_an_adapter_is_not_loaded_twice_under_one_name(folder, tiny):
    load_adapter(tiny.model, folder)
    with pytest.raises(CourseError, match="has an adapter 'default' already"):
        load_adapter(tiny.model, folder)


def test_an_unknown_adapter_is_not_saved(tmp_path, tiny):
    with pytest.raises(CourseError, match="'default' is not known"):
        save_adapter(tiny.model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
