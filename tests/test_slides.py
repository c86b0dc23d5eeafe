"""Tests of the slides that need no browser: their form, their notes, and that their figures and
numbers are the notebook's.

`make test-slides` opens them in Chromium.
"""

import json
import re
from pathlib import Path

import matplotlib
import pytest

from tools import figures
from tools.figures import drawing

ROOT = Path(__file__).parents[1]
SLIDES = ROOT / "slides"
DECKS = {path.stem: path.read_text(encoding="utf-8") for path in sorted(SLIDES.glob("day*.md"))}
STALE = "the notebook was executed again: run `make figures` and bring the slides in step"

DAYS = figures.days()


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


def slide_called(deck, title):
    """The one slide whose title begins so."""
    (slide,) = (slide for slide in slides_of(deck) if f"# {title}" in slide)
    return slide


@pytest.fixture(params=DAYS, ids=lambda day: day.NAME)
def day(request):
    return request.param


@pytest.fixture
def deck(day):
    return DECKS[day.NAME]


@pytest.fixture
def notebook(day):
    return drawing.read_notebook(day.NAME)


def test_every_notebook_has_its_deck():
    assert list(DECKS) == [path.stem for path in sorted((ROOT / "notebooks").glob("day*.ipynb"))]
    assert list(DECKS) == [day.NAME for day in DAYS]


def test_the_front_matter_is_what_works_offline(deck):
    front = deck.removeprefix("---\n").partition("\n---\n")[0].splitlines()
    for line in ("marp: true", "theme: course", "math: mathjax", "paginate: true"):
        assert line in front
    assert 18 <= len(slides_of(deck)) <= 28


def test_every_slide_has_one_title_and_few_words(deck):
    for slide in slides_of(deck):
        assert len(re.findall(r"^# \S", re.sub(r"```.*?```", "", slide, flags=re.S), re.M)) == 1, (
            slide[:80]
        )
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
    silent = [
        slide for slide in slides_of(deck) if not re.search(r"\b[Aa]sk\b", notes_of(slide)[0])
    ]
    assert len(silent) <= 3


def test_slides_and_theme_ask_nothing_from_the_network(deck):
    assert not re.search(r'\]\(https?:|src="(?!figures/)|@import', deck)
    assert not re.search(r"@import|url\(", (SLIDES / "theme.css").read_text(encoding="utf-8"))


def test_the_theme_has_fonts_for_chinese():
    theme = (SLIDES / "theme.css").read_text(encoding="utf-8")
    for font in ("Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei"):
        assert font in theme


def test_every_figure_is_used_described_and_there(deck):
    framed = re.findall(r'<iframe title="(.*?)" src="(.*?)"', deck)
    for text, path in [*re.findall(r"!\[(.*?)\]\((.*?)\)", deck), *framed]:
        assert (SLIDES / path).is_file(), path
        assert len(words_of(re.sub(r"\bw:\d+", "", text))) >= 5, path
    used = {name for text in DECKS.values() for name in re.findall(r'figures/(\w+\.\w+)[)"]', text)}
    assert used == {path.name for path in (SLIDES / "figures").iterdir()}


def test_every_number_is_filled_in(deck):
    assert "??" not in deck


NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
MADE_UP_ID = re.compile(r"(?<=[\"#])[mp][0-9a-f]{10}\b")  # a hash of what is drawn
POINTS = 0.05  # of 1/72 inch: on another CPU the last digits of computed data differ


def difference(one, other):
    """Where two SVG files differ by more than what another CPU makes, or "".

    Words are compared exactly, places in points.
    """
    texts = [MADE_UP_ID.sub("id", text) for text in (one, other)]
    words = [NUMBER.split(text) for text in texts]
    if words[0] != words[1]:
        return next(
            (f"{a!r} / {b!r}" for a, b in zip(*words, strict=False) if a != b), "one is longer"
        )
    numbers = [list(map(float, NUMBER.findall(text))) for text in texts]
    return next((f"{a} / {b}" for a, b in zip(*numbers, strict=True) if abs(a - b) > POINTS), "")


def test_the_figures_are_those_of_the_notebooks_outputs(day, notebook, tmp_path):
    drawn = figures.draw_all(day, notebook, tmp_path)
    prefix = day.NAME.partition("_")[0]
    assert {path.name for path in drawn} == {
        path.name for path in (SLIDES / "figures").glob(f"{prefix}_*")
    }
    tested = re.search(
        r"^matplotlib==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M
    ).group(1)
    for path in drawn:
        committed = SLIDES / "figures" / path.name
        if path.suffix in (".png", ".html"):  # taken out of the notebook as it is
            assert path.read_bytes() == committed.read_bytes(), f"{path.name}: {STALE}"
            continue
        new, old = path.read_text(encoding="utf-8"), committed.read_text(encoding="utf-8")
        if matplotlib.__version__ == tested:
            assert difference(new, old) == "", f"{path.name}: {STALE}"
        # another matplotlib draws other curves, but writes the same words and numbers beside them
        else:
            assert re.findall("<!--(.*?)-->", new) == re.findall("<!--(.*?)-->", old), (
                f"{path.name}: {STALE}"
            )


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda svg: svg.replace("285.19851", "285.19849"), False),
        (lambda svg: svg.replace("m17a79fa7e0", "m17a79fa7e1"), False),
        (lambda svg: svg.replace("285.19851", "285.3"), True),
        (lambda svg: svg.replace("<!-- 1 -->", "<!-- 2 -->"), True),
        (lambda svg: svg.replace("#000000", "#000001"), True),
        (lambda svg: svg.replace("</svg>", "<g/></svg>"), True),
    ],
)
def test_a_last_digit_does_not_count_and_a_number_does(change, differs):
    path = '<path id="m17a79fa7e0" style="stroke: #000000"/><use href="#m17a79fa7e0"/>'
    svg = f'<svg height="285.19851">{path}<!-- 1 --></svg>'
    assert change(svg) != svg
    assert bool(difference(change(svg), svg)) == differs


def test_drawing_needs_the_cells_it_reads(day, tmp_path):
    with pytest.raises(ValueError, match="0 cells of the notebook contain"):
        figures.draw_all(day, {"cells": []}, tmp_path)


def test_the_tables_are_those_of_the_data_and_of_the_notebook(day, deck, notebook):
    assert figures.with_tables(deck, day.tables(notebook)) == deck, "run `make figures`"


def test_a_new_table_takes_the_place_of_the_old_one():
    deck = "# Title\n\n| r | kept |\n|---|---|\n| 1 | 7 |\n\nText.\n"
    assert figures.with_tables(deck, [[{"r": 1, "kept": 8}]]) == deck.replace("7", "8")
    with pytest.raises(ValueError, match="found 0 tables"):
        figures.with_tables("# no table\n", [[{"r": 1}]])


def spaced(text):
    """The text without line breaks and doubled spaces."""
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("part", "read"), [("stated", visible), ("said", lambda slide: notes_of(slide)[0])]
)
def test_numbers_on_slides_and_in_notes_are_those_the_notebook_printed(
    day, deck, notebook, part, read
):
    missing = []
    for title, statements in getattr(day, part)(notebook).items():
        there = spaced(read(slide_called(deck, title)))
        missing += [statement for statement in statements if spaced(statement) not in there]
    assert not missing, STALE


def test_a_number_that_the_notebook_does_not_print_is_named(day):
    with pytest.raises(ValueError, match="0 cells of the notebook contain"):
        day.stated({"cells": []})


def test_the_teaching_guide_plans_the_minutes_of_the_deck(day, deck):
    guide = (SLIDES / "TEACHING.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## Day {day.NAME[3]}\b.*?(?=^## |\Z)", guide, re.M | re.S)
    minutes = [int(found) for found in re.findall(r"^\[(\d+) min\]", deck, re.M)]
    rows = re.findall(r"^\| (\d+)–(\d+) \| .* \| (?:(\d+)–(\d+))? ?\|$", section, re.M)
    now, shown = 0, 0  # minutes, slides; rows without slides are the notebook's and breaks
    for start, end, first, last in rows:
        assert int(start) == now, f"a part begins at minute {start}, expected {now}"
        now = int(end)
        if first:
            assert int(first) == shown + 1
            shown = int(last)
            took = sum(minutes[int(first) - 1 : shown])
            assert now - int(start) == took, f"slides {first} to {last} take {took} minutes"
    assert shown == len(minutes)


def test_the_teaching_guide_points_at_files_that_exist():
    guide = (SLIDES / "TEACHING.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", guide):
        assert (SLIDES / target).exists(), target


def test_the_lock_file_names_no_registry_of_a_single_machine():
    lock = json.loads((ROOT / "package-lock.json").read_text(encoding="utf-8"))
    for name, package in lock["packages"].items():
        assert package.get("resolved", "https://registry.npmjs.org/").startswith(
            "https://registry.npmjs.org/"
        ), name
        assert not name or package["integrity"], name
    wanted = json.loads((ROOT / "package.json").read_text(encoding="utf-8"))["devDependencies"]
    assert {name: lock["packages"][f"node_modules/{name}"]["version"] for name in wanted} == wanted
