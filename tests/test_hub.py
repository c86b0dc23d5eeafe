"""Tests of course_lib.hub against a fake Hub on this machine; tests/faults has what a user sees of
a broken one.
"""

from time import perf_counter

import pytest

from course_lib import hub, models


@pytest.mark.parametrize("status", [200, 302, 307])
def test_a_hub_that_has_the_file_passes(fake_hub, status):
    fake_hub.statuses["HEAD"] = iter([status])
    hub.probe("owner/model")
    assert fake_hub.asked == ["/owner/model/resolve/main/config.json"]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([401], "gated, private or absent .401.: accept its licence"),
        ([403], "gated, private or absent .403.: accept its licence"),
        ([404], "has no owner/model/config.json"),
        ([429, 429], "answered 429 twice"),
        ([500, 503], "answered 503 twice"),
    ],
)
def test_a_refusal_is_named_in_one_line(fake_hub, monkeypatch, answers, message):
    monkeypatch.setattr(hub, "RETRY_SECONDS", 0.01)
    fake_hub.statuses["HEAD"] = iter(answers)
    with pytest.raises(hub.HubError, match=message) as error:
        hub.probe("owner/model")
    assert "\n" not in str(error.value)
    assert len(fake_hub.asked) == len(answers)


def test_a_busy_hub_gets_one_second_chance(fake_hub, monkeypatch):
    monkeypatch.setattr(hub, "RETRY_SECONDS", 0.01)
    fake_hub.statuses["HEAD"] = iter([500, 200])
    hub.probe("owner/model")


def test_a_hub_that_never_answers_costs_the_deadline_once_and_no_more(silent_hub):
    start = perf_counter()
    with pytest.raises(
        hub.HubError, match=r"did not answer within 0\.5 s .restart the kernel to ask it again"
    ):
        hub.probe("owner/model", deadline=0.5)
    assert perf_counter() - start < 1.5
    start = perf_counter()
    with pytest.raises(hub.HubError, match=r"did not answer within 0\.5 s"):
        hub.probe("owner/another")
    assert perf_counter() - start < 0.1


def test_a_mirror_is_asked_although_the_hub_was_silent(fake_hub, monkeypatch):
    mirror = hub.endpoint()
    monkeypatch.setattr(
        hub, "_silent", {"https://silent.example": "https://silent.example did not answer"}
    )
    monkeypatch.setenv("HF_ENDPOINT", "https://silent.example/")
    with pytest.raises(hub.HubError, match="silent.example did not answer"):
        hub.probe("owner/model")
    monkeypatch.setenv("HF_ENDPOINT", mirror)
    hub.probe("owner/model")


@pytest.mark.parametrize("address", ["nonsense", "http://", "http://[half"])
def test_an_endpoint_that_is_no_address_is_named(hub_at, address):
    hub_at(address)
    with pytest.raises(hub.HubError, match="cannot be reached"):
        hub.probe("owner/model")


def test_offline_mode_asks_nothing(fake_hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(hub.HubError, match="HF_HUB_OFFLINE is set"):
        hub.probe("owner/model")
    assert fake_hub.asked == []


def test_a_download_holds_the_files_that_were_chosen_and_is_found_again(fake_hub):
    assert hub.cached("owner/model") is None
    folder = hub.download("owner/model", ["*.json", "*.safetensors"])
    expected = {
        path.name: path.read_bytes()
        for path in models.tiny_folder().iterdir()
        if path.suffix in {".json", ".safetensors"}
    }
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
    assert hub.cached("owner/model") == folder


@pytest.mark.slow
def test_a_slow_download_is_waited_for(fake_hub):
    fake_hub.body = "is slow"
    start = perf_counter()
    folder = hub.download("owner/model", ["*.safetensors"])
    assert perf_counter() - start > hub.SILENCE_SECONDS
    assert (folder / "model.safetensors").read_bytes() == (
        models.tiny_folder() / "model.safetensors"
    ).read_bytes()


def test_the_weights_are_asked_for_when_all_the_rest_is_there(fake_hub):
    hub.download("owner/model", models.MODEL_FILES)
    files = [path.rpartition("/")[2] for path in fake_hub.asked if "/resolve/" in path]
    assert set(files[-2:]) == {"model.safetensors"}
    assert "tokenizer_config.json" in files[:-2]
