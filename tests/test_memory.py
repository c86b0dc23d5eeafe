"""Tests of course_lib.memory: the bills that papers and notes print."""

import pytest

from course_lib.memory import BILLS, training_bytes
from course_lib.runtime import CourseError


@pytest.mark.parametrize(
    ("bill", "expected"), [("bf16", 12), ("fp32", 16), ("mixed, ZeRO", 16), ("mixed, HF", 18), ("fp32 + 8", 24)]
)
def test_bytes_for_each_parameter(bill, expected):
    assert BILLS[bill].bytes_per_parameter == expected


def test_llama_65b_takes_more_than_780_gb():
    assert round(training_bytes(65_285_660_672, "bf16") / 1e9) == 783


def test_a_billion_parameters_take_24_gb_and_not_80():
    assert training_bytes(10**9, "fp32 + 8") == 24 * 10**9


def test_an_unknown_bill_lists_the_known_ones():
    with pytest.raises(CourseError, match="'fp8' is not known, expected one of bf16, fp32"):
        training_bytes(1, "fp8")
