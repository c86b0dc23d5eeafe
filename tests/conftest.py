"""Fixtures shared by the tests: a CPU machine, a tiny base that is new for every test, and the real base, loaded once."""

import pytest

from course_lib import models, runtime
from course_lib.alpaca import Record


@pytest.fixture(scope="session")
def machine() -> runtime.Machine:
    return runtime.decide(gpu=None, override=None, cores=2, memory_bytes=8 * runtime.GIB)


@pytest.fixture
def tiny(machine: runtime.Machine) -> models.Loaded:
    return models.load("tiny", machine)


@pytest.fixture(scope="session")
def smollm2(machine: runtime.Machine) -> models.Loaded:
    base = models.load("smollm2-135m", machine)
    assert base.name == "smollm2-135m", f"these tests need the real base, which `make setup` fetches: {base.origin}"
    return base


@pytest.fixture(scope="session")
def records() -> list[Record]:
    return [
        Record("Name the capital of Peru.", "Lima"),
        Record("Add the numbers.", "12", input="5 and 7"),
        Record("What is a haiku?", "A short Japanese poem of three lines."),
        Record("Repeat the word.", "stone", input="stone"),
    ]
