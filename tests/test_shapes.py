"""Tests of course_lib.shapes: named models make the numbers of weights that their pages print."""

import pytest

from course_lib import surgery
from course_lib.runtime import CourseError
from course_lib.shapes import SHAPES, config_of, gpu_bytes, one_of

WEIGHTS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "falcon-7b": 6_921_720_704,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "yi-6b": 6_061_035_520,
    "yi-1.5-6b": 6_061_035_520,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_named_model_has_as_many_weights_as_its_page_says(name):
    assert surgery.empty_model(config_of(name)).num_parameters() == WEIGHTS[name]


def test_a_folder_with_a_config_is_a_model(tiny, tmp_path):
    tiny.model.config.save_pretrained(tmp_path)
    assert config_of(str(tmp_path)).hidden_size == tiny.model.config.hidden_size
    assert config_of("tiny").hidden_size == tiny.model.config.hidden_size


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("llama-65", "llama-65b"), ("yi1.5-6b", "yi-1.5-6b"), ("Qwen2.5-7", "qwen2.5-7b")],
)
def test_an_unknown_model_gets_the_nearest_names(name, nearest):
    with pytest.raises(CourseError, match=f"'{name}' is not known: the nearest are .*{nearest}"):
        config_of(name)


def test_a_name_that_is_near_to_none_gets_the_whole_list():
    with pytest.raises(CourseError, match="expected one of llama-7b, .*or owner/name on the Hub"):
        config_of("0")


def test_gpus_by_name_and_by_size():
    assert gpu_bytes("T4 ") == gpu_bytes("t4") < 16e9
    assert gpu_bytes("24") == gpu_bytes("24GB") == 24_000_000_000
    assert gpu_bytes("cpu") > 1e9


@pytest.mark.parametrize(("gpu", "nearest"), [("4090", "rtx-4090"), ("a100", "a100-40, a100-80")])
def test_a_part_of_a_gpus_name_is_no_number_of_gb(gpu, nearest):
    with pytest.raises(CourseError, match=f"is not known: the nearest are {nearest}"):
        gpu_bytes(gpu)


@pytest.mark.parametrize(
    "gpu", ["", "24_0", "2e3", "t44444", "a gpu", "-3", "0", "nan", "inf", "1e9"]
)
def test_a_gpu_that_is_none_is_refused_in_one_line(gpu):
    with pytest.raises(CourseError, match="its memory in GB, such as 24") as error:
        gpu_bytes(gpu)
    assert "\n" not in str(error.value)


def test_one_of_names_the_nearest():
    one_of("method", "lora", ["lora", "full"])
    with pytest.raises(CourseError, match="method 'lorra' is not known: the nearest are lora"):
        one_of("method", "lorra", ["lora", "full"])
