"""Tests of course_lib.peft_format: adapters go to peft and come back, damaged or foreign ones are
refused in one line.
"""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from course_lib import sealing
from course_lib.lora import add_lora, lora_layers
from course_lib.peft_format import CONFIG, WEIGHTS, load_adapter, save_adapter
from course_lib.runtime import CourseError
from tests.fixtures.models import adapted, fill, fresh_tiny, logits, small_gpt2

MODELS = {"llama": lambda: fresh_tiny().model, "gpt2": small_gpt2}


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
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=targets,
        use_rslora=rank_stabilized,
        **options,
    )
    theirs = get_peft_model(MODELS[kind](), settings).eval()
    theirs.save_pretrained(tmp_path)
    model = MODELS[kind]()
    load_adapter(model, tmp_path, name="theirs")
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=0)


def test_an_adapter_of_single_layers_names_them_whole(tmp_path):
    model = adapted(targets=["layers.1.self_attn.q_proj", "0.mlp.up_proj"])
    save_adapter(model, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert settings["target_modules"] == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    theirs = PeftModel.from_pretrained(fresh_tiny().model, tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=0)


def test_a_loaded_adapter_stands_beside_others_and_can_be_trained_on(adapter_folder):
    model = adapted(name="other")
    load_adapter(model, adapter_folder, name="loaded")
    updates = [layer.adapters["loaded"] for layer in lora_layers(model, "loaded").values()]
    assert len(updates) == 2 * model.config.num_hidden_layers
    assert all(weight.requires_grad for update in updates for weight in update.parameters())
    assert all(layer.in_use == {"loaded": 1.0} for layer in lora_layers(model, "loaded").values())


def test_a_saved_adapter_replaces_an_older_one_and_nothing_else(adapter_folder):
    model = adapted(targets=["k_proj"])
    save_adapter(model, adapter_folder)
    assert {path.name for path in adapter_folder.iterdir()} == {CONFIG, WEIGHTS, sealing.SEAL}
    assert len(load_file(adapter_folder / WEIGHTS)) == 2 * model.config.num_hidden_layers
    (adapter_folder / "notes.txt").write_text("mine")
    with pytest.raises(CourseError, match="holds something else than an adapter"):
        save_adapter(model, adapter_folder)
    assert (adapter_folder / "notes.txt").read_text() == "mine"


def test_a_folder_in_the_place_of_a_file_is_not_replaced(adapter_folder):
    (adapter_folder / WEIGHTS).unlink()
    # a path to the file where a folder is expected
    save_adapter(adapted(), adapter_folder / WEIGHTS)
    with pytest.raises(CourseError, match="holds something else than an adapter"):
        save_adapter(adapted(), adapter_folder)
    assert (adapter_folder / WEIGHTS / WEIGHTS).is_file()


def test_the_working_folder_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CourseError, match="is the working folder.*: choose a new folder in it"):
        save_adapter(adapted(), ".")
    save_adapter(adapted(), "adapter")


def test_transposed_and_shared_matrices_are_saved(tmp_path, tiny):
    model = adapted(targets=["q_proj"])
    first, *others = (layer.adapters["default"] for layer in lora_layers(model).values())
    first.A.data = torch.randn(128, 4, generator=torch.Generator().manual_seed(0)).T
    for update in others:
        update.A = first.A
    save_adapter(model, tmp_path / "adapter")
    load_adapter(tiny.model, tmp_path / "adapter")
    torch.testing.assert_close(logits(tiny.model), logits(model), atol=1e-4, rtol=0)


def test_an_adapter_of_several_alphas_is_not_saved_as_one(tmp_path):
    model = adapted(targets=["q_proj"])
    next(iter(lora_layers(model).values())).adapters["default"].alpha = 4
    with pytest.raises(
        CourseError,
        match="the layers of adapter 'default' differ .rank 4, alpha 4 and rank 4, alpha 8.",
    ):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(CourseError, match="cannot be written"):
        save_adapter(adapted(), tmp_path / "adapter")
    assert (tmp_path / "adapter").read_text() == "mine"


# --- adapters that cannot be loaded or saved; more of them are in tests/faults


def test_an_adapter_is_not_loaded_twice_under_one_name(adapter_folder, tiny):
    load_adapter(tiny.model, adapter_folder)
    with pytest.raises(CourseError, match="has an adapter 'default' already"):
        load_adapter(tiny.model, adapter_folder)


def test_an_unknown_adapter_is_not_saved(tmp_path, tiny):
    with pytest.raises(CourseError, match="'default' is not known"):
        save_adapter(tiny.model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_name_longer_than_the_disk_takes_is_one_line(tiny):
    with pytest.raises(CourseError, match="holds no adapter_config.json"):
        load_adapter(tiny.model, "x" * 300)
