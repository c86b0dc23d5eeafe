"""Tests of the slides that need no browser: their form, their notes, and that their figures and numbers are the notebook's.

`make test-slides` opens them in Chromium.
"""

import importlib.util
import json
import re
from pathlib import Path

import matplotlib
import pytest

ROOT = Path(__file__).parents[1]
SLIDES = ROOT / "slides"
DECKS = sorted(SLIDES.glob("day*.md"))
DAY1 = (SLIDES / "day1_alpaca.md").read_text(encoding="utf-8")
NOTEBOOK = json.loads((ROOT / "notebooks" / "day1_alpaca.ipynb").read_text(encoding="utf-8"))
STALE = "the notebook was executed again: run `make figures` and bring the slides in step"

_spec = importlib.util.spec_from_file_location("draw_figures", SLIDES / "draw_figures.py")
figures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(figures)


def slides_of(text):
    _, _, body = text.removeprefix("---\n").partition("\n---\n")
    return re.split(r"\n---\n", body)


def notes_of(slide):
    comments = [comment.strip() for comment in re.findall(r"<!--(.*?)-->", slide, re.S)]
    return [comment for comment in comments if not re.match(r"_?\w+:", comment)]


def visible(slide):
    """The text that an audience sees, without pictures and formulas."""
    text = re.sub(r"<!--.*?-->|!\[.*?\]\(.*?\)|\$\$.*?\$\$|```\w*", "", slide, flags=re.S)
    return re.sub(r"\$[^$\n]+\$", "x", text).replace("\N{NO-BREAK SPACE}", " ").replace("**", "")


def words_of(text):
    return re.findall(r"\w[\w.,'’-]*", text)


@pytest.fixture(params=DECKS, ids=lambda path: path.stem)
def deck(request):
    return request.param.read_text(encoding="utf-8")


def test_every_notebook_has_its_deck():
    assert [path.stem for path in DECKS] == [path.stem for path in sorted((ROOT / "notebooks").glob("day*.ipynb"))]


def test_the_front_matter_is_what_works_offline(deck):
    front = deck.removeprefix("---\n").partition("\n---\n")[0].splitlines()
    for line in ("marp: true", "theme: course", "math: mathjax", "paginate: true"):
        assert line in front
    assert 18 <= len(slides_of(deck)) <= 25


def test_every_slide_has_one_title_and_few_words(deck):
    for slide in slides_of(deck):
        assert len(re.findall(r"^# \S", re.sub(r"```.*?```", "", slide, flags=re.S), re.M)) == 1, slide[:80]
        prose = re.sub(r"^\|.*$", "", visible(slide), flags=re.M)
        assert len(words_of(prose)) <= 60, f"{len(words_of(prose))} words: {slide[:80]}"


def test_every_slide_has_notes_that_can_be_read_aloud(deck):
    for slide in slides_of(deck):
        (note,) = notes_of(slide)
        assert re.match(r"\[\d+ min\] ", note), note[:60]
        assert 60 <= len(words_of(note)) <= 120, f"{len(words_of(note))} words: {note[:60]}"


def test_the_minutes_add_up_to_the_announced_total(deck):
    notes = [notes_of(slide)[0] for slide in slides_of(deck)]
    minutes = [int(re.match(r"\[(\d+)", note).group(1)) for note in notes]
    assert f"Total: {sum(minutes)} minutes" in notes[0]


def test_the_class_is_asked_something_on_nearly_every_slide(deck):
    silent = [slide for slide in slides_of(deck) if not re.search(r"\b[Aa]sk\b", notes_of(slide)[0])]
    assert len(silent) <= 3


def test_slides_and_theme_ask_nothing_from_the_network(deck):
    assert not re.search(r"\]\(https?:|src=|@import", deck)
    assert not re.search(r"@import|url\(", (SLIDES / "theme.css").read_text(encoding="utf-8"))


def test_the_theme_has_fonts_for_chinese():
    theme = (SLIDES / "theme.css").read_text(encoding="utf-8")
    for font in ("Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei"):
        assert font in theme


def test_every_figure_is_used_described_and_there(deck):
    for text, path in re.findall(r"!\[(.*?)\]\((.*?)\)", deck):
        assert (SLIDES / path).is_file(), path
        assert len(words_of(re.sub(r"\bw:\d+", "", text))) >= 5, path
    used = {name for path in DECKS for name in re.findall(r"figures/(\w+\.\w+)\)", path.read_text(encoding="utf-8"))}
    assert used == {path.name for path in (SLIDES / "figures").iterdir()}


def test_the_figures_are_those_of_the_notebooks_outputs(tmp_path):
    drawn = figures.draw_all(NOTEBOOK, tmp_path)
    assert {path.name for path in drawn} == {path.name for path in (SLIDES / "figures").glob("day1_*")}
    tested = re.search(r"^matplotlib==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M).group(1)
    for path in drawn:
        committed = (SLIDES / "figures" / path.name).read_bytes()
        if matplotlib.__version__ == tested or path.suffix == ".png":
            assert path.read_bytes() == committed, f"{path.name}: {STALE}"
        else:  # another matplotlib draws other curves, but writes the same words and numbers beside them
            assert re.findall(rb"<!--(.*?)-->", path.read_bytes()) == re.findall(rb"<!--(.*?)-->", committed), (
                f"{path.name}: {STALE}"
            )


def test_drawing_needs_the_cells_it_reads():
    with pytest.raises(ValueError, match="0 cells of the notebook contain"):
        figures.draw_all({"cells": []}, ROOT / "build" / "never")


def test_the_table_of_the_week_is_that_of_the_data():
    assert figures.with_week_table(DAY1) == DAY1, "run `make figures`"
    assert figures.week_table() in DAY1
    assert figures.week_table().count("\n") == 3


def test_a_new_table_of_the_week_takes_the_place_of_the_old_one():
    stale = DAY1.replace("| untouched | 0 |", "| untouched | 7 |")
    assert stale != DAY1
    assert figures.with_week_table(stale) == DAY1
    with pytest.raises(ValueError, match="found 0 tables"):
        figures.with_week_table("# no table\n")


def stated_numbers():
    """Pairs of a statement with the notebook's own numbers, and the title of the slide on which it must stand."""

    def found(fragment, pattern):
        return re.search(pattern, figures.printed(NOTEBOOK, fragment)).groups()

    tokens, trained = found('"tokens, of which supervised:"', r"(\d+) tokens, of which supervised: (\d+)")
    vocabulary, rank = found("has rank", r"each of ([\d,]+) tokens.*rank (\d+)")
    (loss,) = found("theirs = ", r"loss ([\d.]+);")
    inside, positions = found("theirs = ", r"positions in the head: (\d+) of (\d+)")
    (perplexity,) = found("theirs = ", r"exp\(loss\): (\d+)")
    before, after = found("topics with no answer seen", r"right before (\d+), after (\d+)")
    (unseen,) = found("topics with no answer seen", r"training: (\d+) questions")
    lost, asked = found("lost = [", r"(\d+) of \d+ lost, .* JSON: (\d+)")
    steps, supervised = found("steps=STEPS,", r"(\d+) steps, .* \(([\d,]+) supervised\)")
    (train,) = found("things = {}", r"train (\d+) questions")
    (test,) = found("things = {}", r"test (\d+) questions")
    assert int(asked) == 0, "the slide says that none was wrapped in JSON"
    assert supervised
    return {
        f"{trained} of {tokens} tokens": "Only the answer",
        f'each of {vocabulary} tokens; " blue" has rank {rank}': "A model is a distribution",
        f"a score to each of {vocabulary} tokens": "Only supervised positions",
        f"| positions through the head | {positions} | {inside} |": "Only supervised positions",
        f"| loss | {loss} |": "Only supervised positions",
        f"between {perplexity} tokens": "The loss: mean",
        f"rose from {before} to {after} of {unseen}": "Answers that stand in no",
        f"{lost} of 100 plain questions": "What was forgotten",
        f"{steps} steps of 4": "The loss falls",
        f"{train} questions to train, {test} to validate, {test} to test": "The task of the week",
    }


@pytest.mark.parametrize(("statement", "title"), stated_numbers().items())
def test_numbers_on_slides_are_those_the_notebook_printed(statement, title):
    (slide,) = (slide for slide in slides_of(DAY1) if f"# {title}" in slide)
    assert statement in visible(slide), STALE


def test_numbers_in_notes_are_those_of_the_headline():
    (note,) = (notes_of(slide)[0] for slide in slides_of(DAY1) if "# The form: from never to nearly always" in slide)
    result = figures.headline(NOTEBOOK)
    assert list(result) == ["valid JSON", "right topic", "right answer", "retention"]
    for statement in (
        "from {} to {} percent: that is the new behaviour".format(*result["valid JSON"]),
        f"right topic follows, {result['right topic'][1]} percent",
        "rises from {} to {} percent".format(*result["right answer"]),
        "retention falls from {} to {}".format(*result["retention"]),
    ):
        assert statement in note, f"{statement}: {STALE}"


def test_replies_on_the_forgetting_slide_are_the_notebooks():
    rows = {row["question"]: row for row in figures.table_rows(NOTEBOOK, "lost = [")}
    (slide,) = (slide for slide in slides_of(DAY1) if "# What was forgotten" in slide)
    shown = [line.strip("| ").split(" | ") for line in slide.splitlines() if line.startswith("|")][2:]
    assert len(shown) == 3
    for question, before, after in shown:
        assert rows[question]["before"].startswith(before.removesuffix(" …")), STALE
        assert rows[question]["after"].startswith(after.removesuffix(" …")), STALE


def test_the_template_on_the_slide_is_alpacas():
    from course_lib.alpaca import Record

    (block,) = re.findall(r"```text\n(Below.*?)\n```", DAY1, re.S)
    prompt = Record("Give the capital of this country.", "Copenhagen", input="Denmark").prompt
    assert block.split() == prompt.split(), "only the line breaks may differ"


def test_alpacas_steps_follow_from_its_data():
    assert -(-52_002 // 128) * 3 == 1221
    assert "| optimizer steps | 1,221 | 32 |" in DAY1


def test_the_teaching_guide_plans_the_minutes_of_the_deck():
    guide = (SLIDES / "TEACHING.md").read_text(encoding="utf-8")
    minutes = [int(found) for found in re.findall(r"^\[(\d+) min\]", DAY1, re.M)]
    rows = re.findall(r"^\| (\d+)–(\d+) \| .* \| (\d+)–(\d+) \|$", guide, re.M)
    plan = [[int(cell) for cell in row] for row in rows]
    assert (plan[0][0], plan[0][2], plan[-1][3]) == (0, 1, len(minutes))
    for start, end, first, last in plan:
        assert start == sum(minutes[: first - 1]), f"slide {first} begins at minute {sum(minutes[: first - 1])}"
        assert end == sum(minutes[:last]), f"slide {last} ends at minute {sum(minutes[:last])}"
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", guide):
        assert (SLIDES / target).exists(), target


def test_the_lock_file_names_no_registry_of_a_single_machine():
    lock = json.loads((ROOT / "package-lock.json").read_text(encoding="utf-8"))
    for name, package in lock["packages"].items():
        assert package.get("resolved", "https://registry.npmjs.org/").startswith("https://registry.npmjs.org/"), name
        assert not name or package["integrity"], name
    wanted = json.loads((ROOT / "package.json").read_text(encoding="utf-8"))["devDependencies"]
    assert {name: lock["packages"][f"node_modules/{name}"]["version"] for name in wanted} == wanted
