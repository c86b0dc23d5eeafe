"""Tests of course_lib.lora_files: LoRA and what trains beside it go to peft and come back, damaged
or foreign files are refused in one line.
"""

import json
import math
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from course_lib import sealing, vocabulary
from course_lib.adapter_files import CONFIG, WEIGHTS, load_adapter, save_adapter
from course_lib.lora import add_lora, lora_layers, remove_lora
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


# --- adapters that cannot be loaded or saved; more of them are in tests/faults


def test_an_adapter_is_not_loaded_twice_under_one_name(adapter_folder, tiny):
    load_adapter(tiny.model, adapter_folder)
    with pytest.raises(CourseError, match="has an adapter 'default' already"):
        load_adapter(tiny.model, adapter_folder)


def test_an_unknown_adapter_is_not_saved(tmp_path, tiny):
    with pytest.raises(CourseError, match="'default' is not known"):
        save_adapter(tiny.model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# --- what trains beside the matrices


def train_a_little(model, new_rows_from=None):
    """A few steps on everything that requires a gradient, and on new rows."""
    rows = vocabulary.only_new_rows(model, new_rows_from) if new_rows_from else nullcontext()
    with rows:
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
        for _ in range(3):
            model(**BATCH).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def train_modules(*names):
    def prepare(model):
        for name, weight in model.named_parameters():
            weight.requires_grad_(".adapters." in name or any(one in name for one in names))
        train_a_little(model)

    return prepare


def train_new_rows(model):
    prepared("new rows", model)
    train_a_little(model, new_rows_from=1536)


IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
BATCH = {"input_ids": IDS, "labels": IDS}
BESIDE = {
    "embeddings": train_modules("embed_tokens"),
    "norms": train_modules("layernorm", "model.norm"),
    "one norm": train_modules("layers.1.input_layernorm"),
    "embeddings and norms": train_modules("embed_tokens", "norm"),
    "new rows": train_new_rows,
}


def prepared(kind, base=None):
    """A new base, as large as an adapter of this kind needs it."""
    model = base or fresh_tiny().model
    if kind == "new rows":
        torch.manual_seed(0)  # the new rows are random
        model.resize_token_embeddings(1540, mean_resizing=False)
    return model


@pytest.mark.parametrize("kind", BESIDE)
def test_what_trained_beside_the_matrices_comes_back_here_and_in_peft(tmp_path, kind):
    model = adapted()
    frozen = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    BESIDE[kind](model)
    changed = [
        name
        for name, weight in model.named_parameters()
        if ".adapters." not in name and not torch.equal(weight[: len(frozen[name])], frozen[name])
    ]
    assert changed if kind != "new rows" else not changed
    save_adapter(model, tmp_path / "adapter")
    again, theirs = prepared(kind), prepared(kind)
    load_adapter(again, tmp_path / "adapter", say=pytest.fail)
    assert torch.equal(logits(again), logits(model))
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=0)
    # and once more: what came from a file is kept by the next one
    save_adapter(again, tmp_path / "second")
    third = prepared(kind)
    load_adapter(third, tmp_path / "second")
    assert torch.equal(logits(third), logits(model))


THEIRS = {
    "embeddings alone": {"modules_to_save": ["embed_tokens"]},
    "embeddings and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tied embeddings": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "the last norm": {"modules_to_save": ["norm"]},
    "rows": {"trainable_token_indices": {"embed_tokens": [5, 7]}},
    "rows as a list": {"trainable_token_indices": [5, 7]},
}


@pytest.mark.parametrize("kind", THEIRS)
def test_what_peft_trained_beside_the_matrices_is_read_here(tmp_path, kind):
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj"], **THEIRS[kind]
    )
    theirs = get_peft_model(fresh_tiny().model, settings)
    train_a_little(theirs)
    theirs.eval().save_pretrained(tmp_path)
    model = fresh_tiny().model
    load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=0)
    assert (model.lm_head.weight is not model.model.embed_tokens.weight) == (
        kind in ("embeddings alone", "embeddings and head")
    )


def test_a_vocabulary_that_grew_under_peft_is_read_here(tmp_path):
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], trainable_token_indices=[1536, 1539]
    )
    theirs = get_peft_model(prepared("new rows"), settings)
    train_a_little(theirs)
    theirs.eval().save_pretrained(tmp_path)
    model = prepared("new rows")
    load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=0)
    small = fresh_tiny().model
    before = {name: weight.clone() for name, weight in small.named_parameters()}
    with pytest.raises(CourseError, match=r"give the model as many rows first, by add_pieces or"):
        load_adapter(small, tmp_path)
    assert all(torch.equal(before[name], weight) for name, weight in small.named_parameters())


def test_new_rows_need_a_model_that_has_them(tmp_path):
    model = adapted()
    train_new_rows(model)
    save_adapter(model, tmp_path / "adapter")
    assert len(load_file(tmp_path / "adapter" / WEIGHTS)) < 2 * len(lora_layers(model)) + 2
    with pytest.raises(
        CourseError, match="has 1536 rows, and the file one for token 1539: add its tokens first"
    ):
        load_adapter(fresh_tiny().model, tmp_path / "adapter")


def test_a_trained_weight_that_the_format_has_no_place_for_is_refused(tmp_path):
    model = adapted(small_gpt2())
    next(iter(lora_layers(model).values())).base.weight.requires_grad_(True)
    with pytest.raises(CourseError, match=r"trains, and peft's format has no place for it: freeze"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# --- names, parts, NaN


def test_the_base_is_named_by_its_public_name_or_not_at_all(tmp_path, monkeypatch):
    save_adapter(adapted(), tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["base_model_name_or_path"] == "tiny"
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path), "models/mine", "./mine", "~/mine", r"C:\models\mine", ""):
        model = adapted()
        model.config.name_or_path = path
        save_adapter(model, tmp_path / "adapter")
        text = (tmp_path / "adapter" / CONFIG).read_text()
        assert json.loads(text)["base_model_name_or_path"] is None, path
    for path, name in {
        "owner/model": "owner/model",
        "/cache/smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "/hub/models--01-ai--Yi-1.5-6B/snapshots/0a": "01-ai/Yi-1.5-6B",
    }.items():
        model.config.name_or_path = path
        save_adapter(model, tmp_path / "adapter")
        text = (tmp_path / "adapter" / CONFIG).read_text()
        assert json.loads(text)["base_model_name_or_path"] == name


def test_a_file_for_a_part_of_its_layers_and_one_with_dropout_are_said(tmp_path):
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], lora_dropout=0.1)
    get_peft_model(fresh_tiny().model, settings).save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    kept = {name: value for name, value in weights.items() if ".layers.2." not in name}
    save_file(kept, tmp_path / WEIGHTS)
    said, model = [], fresh_tiny().model
    load_adapter(model, tmp_path, say=said.append)
    assert len(lora_layers(model)) == 3
    assert [line.partition(f"{tmp_path} ")[2] for line in said] == [
        "covers 3 of the 4 layers that its config names; model.layers.2.self_attn.q_proj stays as "
        "the base has it",
        "was trained with dropout 0.1; it computes the same here, but trains on without",
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_adapter_that_is_not_finite_is_neither_saved_nor_loaded(tmp_path, adapter_folder, value):
    model = adapted()
    with torch.no_grad():
        next(iter(lora_layers(model).values())).adapters["default"].B[0, 0] = value
    with pytest.raises(CourseError, match="is not finite, so it is of no use: train again"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (adapter_folder / sealing.SEAL).unlink()
    weights = load_file(adapter_folder / WEIGHTS)
    next(iter(weights.values()))[0, 0] = value
    save_file(weights, adapter_folder / WEIGHTS)
    other = fresh_tiny().model
    with pytest.raises(CourseError, match="holds NaN or infinity in base_model"):
        load_adapter(other, adapter_folder)
    assert not lora_layers(other)


def test_adapters_of_a_compiled_model_have_the_names_of_the_family(tmp_path):
    compiled = torch.compile(fresh_tiny().model, backend="eager")
    add_lora(compiled, 4, 8)
    fill(compiled)
    save_adapter(compiled, tmp_path / "adapter")
    plain = fresh_tiny().model
    load_adapter(plain, tmp_path / "adapter")
    torch.testing.assert_close(logits(compiled), logits(plain), atol=1e-6, rtol=0)
    again = torch.compile(fresh_tiny().model, backend="eager")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(compiled))
    theirs = PeftModel.from_pretrained(fresh_tiny().model, tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(plain), atol=1e-5, rtol=0)


def saved_with_a_norm(folder):
    model = adapted()
    train_modules("model.norm")(model)
    save_adapter(model, folder)
    return folder


def test_two_adapters_do_not_share_the_weights_beside_them(tmp_path, adapter_folder):
    with_norm = saved_with_a_norm(tmp_path / "norm")
    model = fresh_tiny().model
    load_adapter(model, with_norm, "a")
    before = logits(model)
    for folder in (with_norm, adapter_folder):
        with pytest.raises(CourseError, match="needs a base of its own .adapter 'a' is there"):
            load_adapter(model, folder, "b")
    model = fresh_tiny().model
    load_adapter(model, adapter_folder, "plain")
    with pytest.raises(CourseError, match="a model has only one model.norm.weight"):
        load_adapter(model, with_norm, "a")
    model = fresh_tiny().model
    load_adapter(model, with_norm, "a")
    assert torch.equal(logits(model), before)


def test_an_adapter_with_weights_beside_it_is_not_removed(tmp_path):
    model = fresh_tiny().model
    load_adapter(model, saved_with_a_norm(tmp_path / "norm"))
    with pytest.raises(CourseError, match=r"model\.norm\.weight trains beside the adapter"):
        remove_lora(model)


def test_a_matrix_that_trained_whole_after_its_rows_is_saved_whole(tmp_path):
    model = prepared("new rows", adapted())
    train_a_little(model, new_rows_from=1536)
    model.get_input_embeddings().weight.requires_grad_(True)
    train_a_little(model)
    save_adapter(model, tmp_path / "a")
    again = prepared("new rows")
    load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(logits(again), logits(model))


def test_rows_in_the_middle_of_a_vocabulary_are_saved_again(tmp_path):
    config = LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6, 7], task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(fresh_tiny().model, config)
    with torch.no_grad():
        for number, weight in enumerate(w for w in theirs.parameters() if w.requires_grad):
            weight.add_(
                0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
            )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fresh_tiny().model
    load_adapter(ours, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    again = fresh_tiny().model
    load_adapter(again, tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(ours))
    torch.testing.assert_close(logits(again), logits(theirs))


def test_a_type_that_keeps_no_weights_is_refused(tmp_path):
    for dtype in (torch.int8, "float16"):
        with pytest.raises(CourseError, match=r"choose torch\.float32 or float16"):
            save_adapter(adapted(), tmp_path / "a", dtype=dtype)


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("modules_to_save", ["lm_head"], "names lm_head, and it holds no weights of it"),
        ("trainable_token_indices", [1, 2], "names rows of tokens, and it holds none"),
        ("bias", "lora_only", r"not plain LoRA .bias=lora_only.: load it with peft"),
        ("target_modules", 5, "target_modules=5, expected names of layers"),
    ],
)
def test_a_config_that_says_more_than_the_file_holds_is_refused(
    adapter_folder, setting, value, said
):
    path = adapter_folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    (adapter_folder / sealing.SEAL).unlink()
    model = fresh_tiny().model
    with pytest.raises(CourseError, match=said):
        load_adapter(model, adapter_folder)
    assert not lora_layers(model)
