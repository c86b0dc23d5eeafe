"""Faults of planning: unknown names, configs that cannot be used, files of no records."""

import json

import pytest
from transformers import AutoConfig

from course_lib import planner
from course_lib.planner import Recipe
from course_lib.runtime import CourseError

FOLDERS = {
    "an empty folder": {},
    "a config.json cut in the middle": {"config.json": '{"model_type": "lla'},
    "a config.json of no model": {"config.json": "[1, 2]"},
    "a config.json of an unknown family": {"config.json": '{"model_type": "llama9"}'},
}


@pytest.mark.fault("D4.8", "a plan for {what}")
@pytest.mark.parametrize("what", FOLDERS)
def test_a_config_that_cannot_be_used_is_one_line(what, survived, tmp_path):
    for name, text in FOLDERS[what].items():
        (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(CourseError, match=r"cannot be used .* give a transformers config") as stop:
        planner.bill(Recipe(str(tmp_path)))
    survived(said=stop.value, lost=[])


@pytest.mark.fault("D4.8", "a plan for a model with {what}")
@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("experts", {"model_type": "mixtral", "num_hidden_layers": 2}),
        ("an encoder", {"model_type": "t5", "num_layers": 2}),
        ("no blocks", {"model_type": "llama", "num_hidden_layers": 0}),
        ("a negative width", {"model_type": "llama", "hidden_size": -8}),
        ("a million blocks", {"model_type": "llama", "num_hidden_layers": 10**6}),
        ("a head that divides nothing", {"model_type": "llama", "num_attention_heads": 0}),
    ],
)
def test_a_model_that_cannot_be_planned_is_one_line(what, changes, survived, tmp_path):
    family = changes.pop("model_type")
    config = AutoConfig.for_model(family).to_dict() | changes | {"model_type": family}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(CourseError) as stop:
        planner.bill(Recipe(str(tmp_path)))
    survived(said=stop.value, lost=[])


@pytest.mark.fault("D4.9", "a plan for {what}")
@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("an unknown model", {"model": "llama-8b"}),
        ("an unknown method", {"method": "qlorra"}),
        ("a batch of none", {"batch": 0}),
        ("a rank that is larger than the layers", {"size": 10**6}),
        ("layers that are not there", {"targets": ("query",)}),
    ],
)
def test_a_recipe_that_cannot_be_is_one_line(what, changes, survived):
    with pytest.raises(CourseError) as stop:
        planner.bill(Recipe(**({"model": "tiny"} | changes)))
    survived(said=stop.value, lost=[])


@pytest.mark.fault("D4.10", "a plan with lengths from {what}")
@pytest.mark.parametrize(
    ("what", "content"),
    [
        ("an empty file", b""),
        ("a file of no records", b'[{"text": "a"}]'),
        ("a file that is no text", bytes(range(256))),
        ("an empty list", b"[]"),
    ],
)
def test_a_file_of_no_records_is_one_line(what, content, survived, tmp_path):
    file = tmp_path / "mine.json"
    file.write_bytes(content)
    with pytest.raises(CourseError) as stop:
        planner.lengths_of(file)
    survived(said=stop.value, lost=[] if file.read_bytes() == content else [file])
