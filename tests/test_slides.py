"""Tests of the slides that need no browser: their form, their notes, and that their figures and numbers are the notebook's.

`make test-slides` opens them in Chromium.
"""

import importlib
import json
import re
import statistics
import sys
from pathlib import Path

import matplotlib
import pytest

from course_lib import experiments

ROOT = Path(__file__).parents[1]
SLIDES = ROOT / "slides"
DECKS = {path.stem: path.read_text(encoding="utf-8") for path in sorted(SLIDES.glob("day*.md"))}
STALE = "the notebook was executed again: run `make figures` and bring the slides in step"

sys.path.insert(0, str(SLIDES))  # the modules that draw stand beside the slides
figures, drawing = importlib.import_module("draw_figures"), importlib.import_module("drawing")
day1, day2 = figures.DAYS
DAY1, DAY2 = DECKS[day1.NAME], DECKS[day2.NAME]
NOTEBOOK1, NOTEBOOK2 = drawing.read_notebook(day1.NAME), drawing.read_notebook(day2.NAME)


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


@pytest.fixture(params=figures.DAYS, ids=lambda day: day.NAME)
def day(request):
    return request.param


@pytest.fixture
def deck(day):
    return DECKS[day.NAME]


def test_every_notebook_has_its_deck():
    assert list(DECKS) == [path.stem for path in sorted((ROOT / "notebooks").glob("day*.ipynb"))]
    assert list(DECKS) == [day.NAME for day in figures.DAYS]


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
    used = {name for text in DECKS.values() for name in re.findall(r"figures/(\w+\.\w+)\)", text)}
    assert used == {path.name for path in (SLIDES / "figures").iterdir()}


def test_every_number_is_filled_in(deck):
    assert "??" not in deck


NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
MADE_UP_ID = re.compile(r"(?<=[\"#])[mp][0-9a-f]{10}\b")  # a hash of what is drawn
POINTS = 0.05  # of 1/72 inch: on another CPU the last digits of computed data differ


def difference(one, other):
    """Where two SVG files differ by more than what another CPU makes, or "". Words are compared exactly, places in points."""
    texts = [MADE_UP_ID.sub("id", text) for text in (one, other)]
    words = [NUMBER.split(text) for text in texts]
    if words[0] != words[1]:
        return next((f"{a!r} / {b!r}" for a, b in zip(*words, strict=False) if a != b), "one is longer")
    numbers = [list(map(float, NUMBER.findall(text))) for text in texts]
    return next((f"{a} / {b}" for a, b in zip(*numbers, strict=True) if abs(a - b) > POINTS), "")


def test_the_figures_are_those_of_the_notebooks_outputs(day, tmp_path):
    drawn = figures.draw_all(day, drawing.read_notebook(day.NAME), tmp_path)
    prefix = day.NAME.partition("_")[0]
    assert {path.name for path in drawn} == {path.name for path in (SLIDES / "figures").glob(f"{prefix}_*")}
    tested = re.search(r"^matplotlib==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M).group(1)
    for path in drawn:
        committed = SLIDES / "figures" / path.name
        if path.suffix == ".png":  # taken out of the notebook as it is
            assert path.read_bytes() == committed.read_bytes(), f"{path.name}: {STALE}"
            continue
        new, old = path.read_text(encoding="utf-8"), committed.read_text(encoding="utf-8")
        if matplotlib.__version__ == tested:
            assert difference(new, old) == "", f"{path.name}: {STALE}"
        else:  # another matplotlib draws other curves, but writes the same words and numbers beside them
            assert re.findall("<!--(.*?)-->", new) == re.findall("<!--(.*?)-->", old), f"{path.name}: {STALE}"


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
    svg = '<svg height="285.19851"><path id="m17a79fa7e0" style="stroke: #000000"/><use href="#m17a79fa7e0"/><!-- 1 --></svg>'
    assert change(svg) != svg
    assert bool(difference(change(svg), svg)) == differs


def test_drawing_needs_the_cells_it_reads(day, tmp_path):
    with pytest.raises(ValueError, match="0 cells of the notebook contain"):
        figures.draw_all(day, {"cells": []}, tmp_path)


def test_the_tables_are_those_of_the_data_and_of_the_notebook(day, deck):
    assert figures.with_tables(deck, day.tables(drawing.read_notebook(day.NAME))) == deck, "run `make figures`"


def test_a_day_shows_its_own_methods_in_the_table_of_the_week():
    (week,) = day1.tables(NOTEBOOK1)
    assert [row["method"] for row in week] == ["untouched", "full fine-tuning"]
    for method in ("last 8 of 30 blocks", "LoRA r=8, all linear layers", *(row["method"] for row in week)):
        assert re.fullmatch(day2.WEEK, method), method
    for later in ("AdaLoRA", "QLoRA r=8", "prefix tuning"):
        assert not re.fullmatch(day2.WEEK, later), later


def test_a_new_table_takes_the_place_of_the_old_one():
    tables = day1.tables(NOTEBOOK1)
    stale = DAY1.replace("| untouched | 0 |", "| untouched | 7 |")
    assert stale != DAY1
    assert figures.with_tables(stale, tables) == DAY1
    with pytest.raises(ValueError, match="found 0 tables"):
        figures.with_tables("# no table\n", tables)


def found(notebook, fragment, pattern):
    """The groups of `pattern` in what the cell with `fragment` printed."""
    text = drawing.printed(notebook, fragment)
    match = re.search(pattern, text)
    assert match, f"{pattern!r} is not in the output {text!r} of the cell with {fragment!r}"
    return match.groups()


def stated_on_day1():
    """Statements with the notebook's own numbers, and the begin of the title of the slide on which each must stand."""
    tokens, trained = found(NOTEBOOK1, '"tokens, of which supervised:"', r"(\d+) tokens, of which supervised: (\d+)")
    vocabulary, rank = found(NOTEBOOK1, "has rank", r"each of ([\d,]+) tokens.*rank (\d+)")
    (loss,) = found(NOTEBOOK1, "theirs = ", r"loss ([\d.]+);")
    inside, positions = found(NOTEBOOK1, "theirs = ", r"positions in the head: (\d+) of (\d+)")
    (perplexity,) = found(NOTEBOOK1, "theirs = ", r"exp\(loss\): (\d+)")
    before, after = found(NOTEBOOK1, "topics with no answer seen", r"right before (\d+), after (\d+)")
    (unseen,) = found(NOTEBOOK1, "topics with no answer seen", r"training: (\d+) questions")
    lost, wrapped = found(NOTEBOOK1, "lost = [", r"(\d+) of \d+ lost, .* JSON: (\d+)")
    (steps,) = found(NOTEBOOK1, "steps=STEPS,", r"(\d+) steps")
    (train,) = found(NOTEBOOK1, "things = {}", r"train (\d+) questions")
    (test,) = found(NOTEBOOK1, "things = {}", r"test (\d+) questions")
    assert int(wrapped) == 0, "the slide says that none was wrapped in JSON"
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


def said_on_day1():
    """The same for what stands in the notes."""
    result = day1.headline(NOTEBOOK1)
    assert list(result) == ["valid JSON", "right topic", "right answer", "retention"]
    statements = (
        "from {} to {} percent: that is the new behaviour".format(*result["valid JSON"]),
        f"right topic follows, {result['right topic'][1]} percent",
        "rises from {} to {} percent".format(*result["right answer"]),
        "retention falls from {} to {}".format(*result["retention"]),
    )
    return dict.fromkeys(statements, "The form: from never to nearly always")


def mean_percent(runs, measure="exact match"):
    return round(statistics.mean(day2.percents(runs, measure)))


def stated_on_day2():
    w0, trained = found(NOTEBOOK2, "lora.LoRALinear(nn.Linear(200, 500)", r"W0 alone: ([\d,]+) weights; ([\d,]+) of")
    (kilobytes,) = found(NOTEBOOK2, '"one adapter:"', r"one adapter: (\d+ kB)")
    count = 'for name, model, targets, rank in (("LLaMA-7B"'
    counted = {name: found(NOTEBOOK2, count, rf"{name}, .*: ([\d,]+) \+ ([\d,]+) =") for name in ("LLaMA-7B", "Falcon-7B")}
    (times,) = found(NOTEBOOK2, "GPT3_LAYERS, GPT3_WIDTH", r"350 GB / 36 MiB = ([\d,]+)")
    gpt3 = next(row for row in drawing.table_rows(NOTEBOOK2, "GPT3_LAYERS, GPT3_WIDTH") if row["r"] == "4")
    throughput, less = found(NOTEBOOK2, "43.1 / 32.5", r"throughput \+([\d.]+)%, time -([\d.]+)%")
    adapter, model = found(NOTEBOOK2, '"adapter on disk:', r"adapter on disk: ([\d.]+ MB); the model: (\d+ MB)")
    *_, weights = day2.result_rows(NOTEBOOK2)
    full, lora = (int(weights[column].replace(",", "")) for column in ("Day 1: all weights", "today: LoRA"))
    scaled = mean_percent(day2.effect("scaling")["r=64, alpha 8 / r"])
    energy = round(100 * day2.updates()["tiny"][8]["energy"])
    return {
        f"Eight directions: {energy} % for tiny, {day2.random_energy(8):.0f} % of a random matrix": "A few directions",
        f"{trained} numbers instead of {w0}": "Freeze the matrix",
        f"One adapter of tiny: {kilobytes}": "Ours computes",
        f"| LLaMA-7B | q, v | 8 | {counted['LLaMA-7B'][1]} | {counted['LLaMA-7B'][0]} |": "Count before",
        f"| Falcon-7B | query_key_value | 32 | {counted['Falcon-7B'][1]} | {counted['Falcon-7B'][0]} |": "Count before",
        f"| GPT-3 | {gpt3['GPT-3 175B']} | 4 | 175 billion | {gpt3['trained']} | {gpt3['file in fp16']} |": "Count before",
        f"350 GB, {times} times": "Count before",
        f"rank 64 reaches {scaled} % at 0.005": "Each rank has",
        f"{100 * lora / full:.1f} % of the weights learn the form": "1.8 %",
        f"On disk: {adapter} for the adapter, {model} for the model": "Merged",
        f"{throughput} % more throughput, {less} % less time": "Four sentences",
    }


def kept(runs, method):
    return mean_percent([run for run in runs if run.method == method], "retention")


def said_on_day2():
    best = {rank: mean_percent(runs) for rank, (_, runs) in day2.best_rates().items()}
    too_fast = mean_percent(day2.effect("rank and rate")["r=64, 0.005"])
    full, lora = found(NOTEBOOK2, "before activations;", r"'full fine-tuning': '([\d.]+) GB', 'LoRA': '([\d.]+) GB'")
    (seconds,) = found(NOTEBOOK2, 'print("retention", evaluation.percent(', r"weights trained in (\d+) s")
    apart, fused = found(NOTEBOOK2, "fusion.train_fused(together", r"one after the other ([\d.]+) s, fused ([\d.]+) s")
    blends = {row["weights"]: row for row in drawing.table_rows(NOTEBOOK2, "for opening, close in (")}
    half, both = blends["0.5 / 0.5"], blends["1 / 1"]
    runs = [*experiments.read_outcomes(), *experiments.read_effect("forgetting", experiments.LORA_FILE)]
    full_kept = [kept(runs, f"full fine-tuning{rate}") for rate in (", 5e-05", "", ", 0.0002")]
    lora_kept = [kept(runs, f"LoRA r=8, all linear layers{rate}") for rate in (", 0.001", "", ", 0.005")]
    assert full_kept[0] == full_kept[1]
    return {
        f"keeps {full_kept[0]} percent at the two lower rates, and {full_kept[2]} at the highest": "Does LoRA forget less?",
        "LoRA: {}, {}, {}".format(*lora_kept): "Does LoRA forget less?",
        f"keeps less, {lora_kept[1]} percent against {full_kept[1]}": "The table of the week",
        f"it falls apart, {too_fast} percent": "Each rank has",
        f"all four lie between {min(best.values())} and {max(best.values())}": "Each rank has",
        f"take {lora} gigabytes instead of {full}": "1.8 %",
        f"the run took {seconds} seconds": "1.8 %",
        f"rank one reaches {best[1]} percent and rank sixteen {best[16]}": "How large",
        f"the close survives in {half['closes']} of {half['of']} replies, the opening in {half['opens']}": "Adapters mix",
        f"both ornaments in {both['both']} of {both['of']}": "Adapters mix",
        f"{apart} seconds one after the other, {fused} fused": "Four jobs",
    }


@pytest.mark.parametrize(("deck", "stated"), [(DAY1, stated_on_day1), (DAY2, stated_on_day2)], ids=["day1", "day2"])
def test_numbers_on_slides_are_those_the_notebook_printed(deck, stated):
    missing = [statement for statement, title in stated().items() if statement not in visible(slide_called(deck, title))]
    assert not missing, STALE


@pytest.mark.parametrize(("deck", "said"), [(DAY1, said_on_day1), (DAY2, said_on_day2)], ids=["day1", "day2"])
def test_numbers_in_notes_are_those_the_notebook_printed(deck, said):
    missing = [statement for statement, title in said().items() if statement not in notes_of(slide_called(deck, title))[0]]
    assert not missing, STALE


def test_what_the_notebook_found_true_is_what_day_2_says():
    for fragment, pattern in (
        ("losses = [objective.supervised_loss(model, batch)", "difference of the losses below 1e-6: True"),
        ("library = theirs.get_submodule", "gradients equal to 1e-6: True"),
        ("merged = lora.merged_copy(base.model)", "logit below 1e-3: True"),
        ("fusion.train_fused(together", "losses equal to 1e-4: True"),
    ):
        assert re.search(pattern, drawing.printed(NOTEBOOK2, fragment)), fragment
    known = day2.percents(day2.effect("vocabulary")["LoRA r=16 and embeddings, 0.005"])
    assert (known.count(100), len(known)) == (2, 3), "the note says: every word in two of three seeds"


def test_sizes_of_adapter_files_follow_from_their_weights():
    rows = re.findall(r"\| ([\d,]+) \| (\d+) MiB \|", slide_called(DAY2, "Count before"))
    assert len(rows) == 3
    for trained, size in rows:
        assert 2 * int(trained.replace(",", "")) == int(size) * 2**20


def test_replies_on_the_forgetting_slide_are_the_notebooks():
    rows = {row["question"]: row for row in drawing.table_rows(NOTEBOOK1, "lost = [")}
    slide = slide_called(DAY1, "What was forgotten")
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


def test_the_teaching_guide_plans_the_minutes_of_the_deck(day, deck):
    guide = (SLIDES / "TEACHING.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## Day {day.NAME[3]}\b.*?(?=^## |\Z)", guide, re.M | re.S)
    minutes = [int(found) for found in re.findall(r"^\[(\d+) min\]", deck, re.M)]
    rows = re.findall(r"^\| (\d+)–(\d+) \| .* \| (\d+)–(\d+) \|$", section, re.M)
    plan = [[int(cell) for cell in row] for row in rows]
    assert (plan[0][0], plan[0][2], plan[-1][3]) == (0, 1, len(minutes))
    for start, end, first, last in plan:
        assert start == sum(minutes[: first - 1]), f"slide {first} begins at minute {sum(minutes[: first - 1])}"
        assert end == sum(minutes[:last]), f"slide {last} ends at minute {sum(minutes[:last])}"


def test_the_teaching_guide_points_at_files_that_exist():
    guide = (SLIDES / "TEACHING.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", guide):
        assert (SLIDES / target).exists(), target


def test_the_lock_file_names_no_registry_of_a_single_machine():
    lock = json.loads((ROOT / "package-lock.json").read_text(encoding="utf-8"))
    for name, package in lock["packages"].items():
        assert package.get("resolved", "https://registry.npmjs.org/").startswith("https://registry.npmjs.org/"), name
        assert not name or package["integrity"], name
    wanted = json.loads((ROOT / "package.json").read_text(encoding="utf-8"))["devDependencies"]
    assert {name: lock["packages"][f"node_modules/{name}"]["version"] for name in wanted} == wanted
