"""Tests of course_lib.tensor_files: a folder is replaced whole, or not at all; what is not such a
folder is refused in one line.
"""

import pytest
import torch
from safetensors.torch import load_file

from course_lib import sealing, tensor_files
from course_lib.adapter_files import load_adapter, save_adapter
from course_lib.runtime import CourseError
from course_lib.tensor_files import CONFIG, WEIGHTS
from tests.fixtures.models import adapted


def test_what_is_written_is_read_again(tmp_path):
    settings, tensors = {"rank": 2, "name": "ä"}, {"a": torch.eye(3)[:, 1:].T}
    tensor_files.publish(tmp_path / "a", settings, tensors)
    found, weights = tensor_files.read(tmp_path / "a")
    assert found == settings
    assert torch.equal(weights["a"], tensors["a"])


def test_what_is_not_finite_is_neither_written_nor_read(tmp_path):
    with pytest.raises(CourseError, match="w is not finite, so it is of no use"):
        tensor_files.publish(tmp_path / "a", {}, {"w": torch.tensor([torch.inf])})
    assert not (tmp_path / "a").exists()


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


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(CourseError, match="cannot be written"):
        save_adapter(adapted(), tmp_path / "adapter")
    assert (tmp_path / "adapter").read_text() == "mine"


def test_a_name_longer_than_the_disk_takes_is_one_line(tiny):
    with pytest.raises(CourseError, match="holds no adapter_config.json"):
        load_adapter(tiny.model, "x" * 300)
