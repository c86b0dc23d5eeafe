"""The tests can fail: three bugs, each planted by hand into a copy of the course, turn the test red
that is about it.
"""

import contextlib
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.fixtures.rows import first_fast

ROOT = Path(__file__).parents[2]
# of its own: what it preloads holds nothing of the course
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["accelerate", "transformers.models.llama.modeling_llama", "pytest"]
)
BUGS = {
    "labels shifted by one": (
        "course_lib/objective.py",
        "hidden[:, :-1][supervised]",
        "hidden[:, 1:][supervised]",
        "tests/test_objective.py::test_loss_equals_cross_entropy_written_out",
    ),
    "EOS dropped": (
        "course_lib/batching.py",
        "answer_ids = [*encode_text(answer, tokenizer), tokenizer.eos_token_id]",
        "answer_ids = encode_text(answer, tokenizer)",
        "tests/test_batching.py::test_only_the_answer_and_eos_are_trained[tiny]",
    ),
    "a checkpoint sealed without its optimizer": (
        "course_lib/checkpoints.py",
        'OPTIMIZER: _flat(state.optimizer.state_dict()["state"]),',
        "OPTIMIZER: {},",
        "tests/test_checkpoints.py::test_a_resumed_run_equals_an_unbroken_one",
    ),
}


@pytest.fixture
def copy(tmp_path):
    for folder in ("course_lib", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "data").symlink_to(ROOT / "data")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def pytest_here(copy, tests):
    """Run tests of the copy in this process, which has imported the libraries and nothing of the
    course.
    """
    assert "course_lib" not in sys.modules
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    with Path("output").open("w") as output, contextlib.redirect_stdout(output):
        code = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])
    os._exit(code)


def run_tests(copy, *tests):
    """The exit code of pytest, and what it printed."""
    process = PROCESSES.Process(target=pytest_here, args=(copy, tests))
    process.start()
    process.join()
    return process.exitcode, (copy / "output").read_text()


@pytest.mark.slow
def test_a_copy_without_a_bug_is_green(copy):
    code, output = run_tests(copy, *(test for *_, test in BUGS.values()))
    assert code == pytest.ExitCode.OK, output
    assert f"{len(BUGS)} passed" in output


@pytest.mark.parametrize("bug", first_fast(BUGS))
def test_a_planted_bug_turns_its_test_red(bug, copy):
    file, right, wrong, test = BUGS[bug]
    source = (copy / file).read_text()
    assert source.count(right) == 1
    (copy / file).write_text(source.replace(right, wrong))
    code, output = run_tests(copy, test)
    assert code == pytest.ExitCode.TESTS_FAILED, output
    assert f"FAILED {test}" in output
