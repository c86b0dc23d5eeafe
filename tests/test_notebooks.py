"""Tests of tools.notebooks and of the notebooks' form; nbval checks what they print."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course_lib import batching
from course_lib.alpaca import Record
from course_lib.runtime import CourseError
from tools import notebooks
from tools.page import write_page
from tools.stamp import stamp

ROOT = Path(__file__).parents[1]
DAYS = sorted((ROOT / "notebooks").glob("*.ipynb"))


HEADLINE = """from course_lib.evaluation import Headline
Headline({"sums": {"after": right, "unit": "of 5"}})"""


def write(folder, *sources, name="day1_trial.ipynb", tags=()):
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    notebook.cells[-1].metadata.tags = list(tags)
    nbformat.write(notebook, folder / name)
    return folder / name


def test_a_notebook_is_executed_measured_and_its_headline_found(tmp_path):
    execution = notebooks.execute(write(tmp_path, "right = 4", HEADLINE, tags=["headline"]))
    assert execution.failure == ""
    assert execution.headline == {"sums": {"after": 4, "unit": "of 5"}}
    assert execution.peak_bytes > 10 * 2**20
    assert [cell.execution_count for cell in execution.notebook.cells] == [1, 2]


def test_a_failing_cell_is_named_and_ends_the_notebook(tmp_path):
    execution = notebooks.execute(write(tmp_path, "x = 1", "x / 0", "print('never')"))
    assert execution.failure == "cell 2/3: ZeroDivisionError: division by zero"
    assert execution.notebook.cells[2].outputs == []


def test_a_course_error_in_a_cell_is_shown_without_traceback(tmp_path):
    path = write(
        tmp_path,
        "from course_lib.runtime import CourseError\nraise CourseError('found 3, expected 4: add "
        "one')",
    )
    execution = notebooks.execute(path)
    assert execution.failure == "cell 1/1: CourseError: found 3, expected 4: add one"
    assert execution.notebook.cells[0].outputs[0].traceback == [
        "CourseError: found 3, expected 4: add one"
    ]


def test_a_file_that_is_no_notebook_is_reported_and_stands_on_the_page(tmp_path):
    (tmp_path / "day1_trial.ipynb").write_text("{")
    execution = notebooks.execute(tmp_path / "day1_trial.ipynb")
    assert execution.failure.startswith("not a notebook")
    assert "not a notebook" in write_page(
        [execution], tmp_path / "out", tmp_path / "slides"
    ).read_text(encoding="utf-8")


def test_tidying_keeps_the_last_state_of_a_progress_bar():
    bar = new_output("stream", text="\r  0%|  |\r 50%|# |\r100%|##| 2/2\ndone\n", name="stdout")
    notebook = new_notebook(
        cells=[new_code_cell("1", outputs=[bar])], metadata={"widgets": {"id": "random"}}
    )
    notebook.cells[0].metadata["execution"] = {"iopub.status.busy": "2026-01-01"}
    notebooks.tidy(notebook)
    assert notebook.cells[0].outputs[0].text == "100%|##| 2/2\ndone\n"
    assert notebook.cells[0].metadata == {}
    assert "widgets" not in notebook.metadata


def test_the_page_lists_the_days_and_asks_nothing_from_the_network(tmp_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    (slides / "day1_trial.pdf").write_bytes(b"%PDF")
    (slides / "figures").mkdir()
    (slides / "figures" / "day1_loss.png").write_bytes(b"PNG")
    path = write(
        tmp_path, HEADLINE.replace("right", "4").replace("sums", "JSON & <b>"), tags=["headline"]
    )
    notebook = nbformat.read(path, 4)
    notebook.cells.append(
        new_markdown_cell("[![Open in Colab](https://example.org/badge.svg)](#top)")
    )
    nbformat.write(notebook, path)
    execution = notebooks.execute(path)
    index = write_page([execution], tmp_path / "out", slides)
    page, day = (
        index.read_text(encoding="utf-8"),
        (index.parent / "day1_trial.html").read_text(encoding="utf-8"),
    )
    assert page.count("<tr") == 2
    assert "JSON &amp; &lt;b&gt;: 4 of 5" in page
    assert 'href="day1_trial.pdf"' in page
    assert (index.parent / "day1_trial.pdf").is_file()
    assert (index.parent / "figures" / "day1_loss.png").is_file(), (
        "a deck in HTML links its figures"
    )
    assert "Open in Colab</a>" in day
    for html in (page, day):
        assert not re.findall(r'(?:src="|<link[^>]*href=")(?:https?:)?//', html)


def test_a_failure_stands_on_the_page(tmp_path):
    execution = notebooks.execute(write(tmp_path, "1 / 0"))
    index = write_page([execution], tmp_path / "out", tmp_path / "slides")
    assert "cell 1/1: ZeroDivisionError" in index.read_text(encoding="utf-8")


def test_a_missing_day_is_named(tmp_path):
    with pytest.raises(CourseError, match="no notebook of day 3"):
        notebooks.find_notebooks(tmp_path, 3)
    with pytest.raises(CourseError, match="run this in a checkout"):
        notebooks.find_notebooks(tmp_path)


def test_stamping_writes_the_address_everywhere_and_once(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").write_text(
        '[project.urls]\nRepository = "https://github.com/new/home"\n'
    )
    (tmp_path / "README.md").write_text(
        "https://colab.research.google.com/github/old/place/blob/main/notebooks/day1.ipynb"
    )
    write(tmp_path / "notebooks", 'REPO, REF = "old/place", "main"')
    assert len(stamp(tmp_path)) == 2
    assert "github/new/home/blob/main" in (tmp_path / "README.md").read_text()
    assert (
        'REPO, REF = "new/home", "main"'
        in nbformat.read(tmp_path / "notebooks" / "day1_trial.ipynb", 4).cells[0].source
    )
    assert stamp(tmp_path) == []


def test_the_committed_address_is_that_of_pyproject(tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    assert stamp(tmp_path) == [], "run `make stamp`"


@pytest.fixture(params=DAYS, ids=lambda path: path.stem)
def day(request):
    return nbformat.read(request.param, as_version=4)


def test_a_day_is_named_after_its_subject(day, request):
    path = request.node.callspec.params["day"]
    title = re.match(r"# Day (\d) · (\w+)", day.cells[0].source)
    assert path.stem == f"day{title[1]}_{title[2].lower()}"


def test_a_day_was_executed_top_to_bottom_without_errors(day):
    nbformat.validate(day)
    code = [cell for cell in day.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]


def test_a_days_outputs_are_tidy(day):
    for cell in day.cells:
        for output in cell.get("outputs", []):
            assert "\r" not in output.get("text", "")
            assert output.get("name") != "stderr", output.get("text")


def test_a_day_reads_as_a_lesson(day):
    kinds = [cell.cell_type for cell in day.cells]
    assert kinds[0] == "markdown"
    assert day.cells[0].source.startswith("# Day ")
    assert "colab.research.google.com" in day.cells[0].source
    assert not any(kinds[i : i + 4] == ["code"] * 4 for i in range(len(kinds))), (
        "more than three code cells in a row"
    )
    for cell in day.cells:
        assert len(cell.source) > 12
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 20, cell.source


def main_road(day):
    """The cells before the optional sections."""
    ends = [i for i, cell in enumerate(day.cells) if cell.source.startswith("## Optional sections")]
    return day.cells[: ends[0] if ends else None]


# of the second pattern: the days whose core exercises are used
BUILT = [path for path in DAYS if "checks.use(" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", BUILT, ids=lambda path: path.stem)
def test_a_day_shows_its_effect_first_and_its_main_road_is_short(path):
    road = main_road(nbformat.read(path, as_version=4))
    code = [cell for cell in road if cell.cell_type == "code"]
    (settings,) = (i for i, cell in enumerate(code) if "runtime.detect()" in cell.source)
    effect = next(i for i, cell in enumerate(code) if '"before"' in cell.source)
    assert effect <= settings + 2
    assert len(road) <= 90
    assert sum("checks.use(" in cell.source for cell in code) in (3, 4, 5)


TEMPLATE_END = ["## What we know now", "## Limits", "## On a T4", "## Quiz", "## References"]


def headings(cells):
    return [
        line
        for cell in cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line[:3] == "## "
    ]


def test_a_day_ends_with_the_headings_of_the_template(day):
    template = nbformat.read(ROOT / "docs" / "template_day.ipynb", as_version=4)
    for notebook in (template, day):
        assert headings(main_road(notebook))[-len(TEMPLATE_END) :] == TEMPLATE_END


@pytest.fixture
def nothing_to_fetch(tmp_path, monkeypatch, no_network):
    """An empty cache and no network, for the kernels started in the test."""
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COURSE_DEVICE", "")


def test_the_template_becomes_a_day_as_contributing_says(tmp_path, nothing_to_fetch):
    text = (ROOT / "docs" / "template_day.ipynb").read_text(encoding="utf-8")
    (tmp_path / "notebooks").mkdir()
    path = tmp_path / "notebooks" / "day2_lora.ipynb"
    path.write_text(re.sub(r"\bN\b|(?<=day)N|(?<=E)N", "2", text), encoding="utf-8")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "README.md", tmp_path)
    stamp(tmp_path)
    execution = notebooks.execute(notebooks.find_notebooks(tmp_path / "notebooks", 2)[0])
    assert execution.failure == ""
    assert execution.headline == {
        "exact match before training": {"after": 0.0, "unit": "percent", "questions": 540}
    }
    test_a_day_reads_as_a_lesson(execution.notebook)
    test_a_day_was_executed_top_to_bottom_without_errors(execution.notebook)


def test_a_day_has_a_headline_and_runs_in_colab(day):
    assert sum("headline" in cell.metadata.get("tags", []) for cell in day.cells) == 1
    assert day.metadata["accelerator"] == "GPU"
    assert day.metadata["colab"]["gpuType"] == "T4"
    install = [
        cell.source
        for cell in day.cells
        if '"-m", "pip"' in cell.source and cell.cell_type == "code"
    ]
    assert len(install) == 1
    assert '"--no-deps"' in install[0]


@pytest.mark.slow
@pytest.mark.parametrize("path", DAYS, ids=lambda path: path.stem)
def test_a_day_runs_on_tiny_where_nothing_can_be_fetched(path, nothing_to_fetch):
    execution = notebooks.execute(path)
    assert execution.failure == ""
    assert "tiny, from data/tiny_llama" in json.dumps(execution.notebook)


def test_the_network_is_blocked_while_nbval_runs():
    code = """
import socket, urllib.request
for attempt in (
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=5),
    lambda: socket.getaddrinfo("example.org", 80),
    lambda: urllib.request.urlopen("http://example.org", timeout=5),
):
    try:
        attempt()
    except OSError as error:
        assert "blocked in this test" in str(error), error
    else:
        raise SystemExit("not blocked")
assert socket.socket().connect_ex(("192.0.2.1", 80)) != 0
with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname()).close()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "offline")}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "PYTHONPATH=$(CURDIR)/tests/offline" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_day_without_the_package_trains_a_model(tmp_path, monkeypatch, no_network, capsys):
    day = nbformat.read(ROOT / "notebooks" / "day1_alpaca.ipynb", as_version=4)
    (folded,) = (cell.source for cell in day.cells if "AutoModelForCausalLM" in cell.source)
    program = re.search(r"```python\n(.*?)```", folded, re.S)[1]
    assert "course_lib" not in program
    data = (ROOT / "data").as_posix()
    for old, new in (
        ("HuggingFaceTB/SmolLM2-135M-Instruct", f"{data}/tiny_llama"),
        ("data/structured_answers.json", f"{data}/structured_answers.json"),
        ("32, 4, 1e-4", "8, 4, 1e-3"),
    ):
        assert program.count(old) == 1
        program = program.replace(old, new)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alone.py").write_text(program, encoding="utf-8")
    names = runpy.run_path("alone.py")
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0] - 1
    record = names["records"][0]
    ours = batching.encode(
        Record(record["instruction"], record["output"], record["input"]), names["tokenizer"]
    )
    assert names["example"](record) == (ours.input_ids, ours.labels)
    assert (tmp_path / "my_model" / "model.safetensors").is_file()
