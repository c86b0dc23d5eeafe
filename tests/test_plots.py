"""Tests of course_lib.plots: what is drawn is what was given."""

import itertools

import matplotlib
import pytest

matplotlib.use("agg")

from matplotlib.colors import to_rgba

from course_lib import plots
from course_lib.plots import ACCENT, PALE


@pytest.fixture(autouse=True)
def close_figures():
    yield
    matplotlib.pyplot.close("all")


def test_the_loss_curve_holds_every_step_and_its_mean():
    axes = plots.plot_loss([4.0, 2.0, 3.0], "It falls", smooth=2)
    each, mean = (line.get_ydata().tolist() for line in axes.lines)
    assert each == [4, 2, 3]
    assert mean == [4, 3, 2.5]
    assert axes.get_title() == "It falls"
    assert "nats" in axes.get_ylabel()


def test_one_panel_for_each_model():
    axes = plots.plot_next_tokens(
        {"count": {" sky": 0.5, " sea": 0.25}, "model": {" blue": 0.9}}, "Both guess"
    )
    panels = axes.figure.axes
    assert [panel.get_title() for panel in panels] == ["count", "model"]
    assert [bar.get_width() for bar in panels[0].patches] == [0.5, 0.25]


def test_shares_are_drawn_in_percent_side_by_side():
    axes = plots.plot_shares(
        {"valid JSON": {"before": 0.0, "after": 0.9}, "topic": {"before": 0.1, "after": 0.8}},
        "It learned",
    )
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0, 10, 90, 80])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["before", "after"]


def test_bills_stack_their_parts():
    axes = plots.plot_bills(
        {"fp32": {"weights": 4, "moments": 8}, "bf16": {"weights": 2, "moments": 8}}, "The bill"
    )
    assert [bar.get_width() for bar in axes.patches] == [4, 2, 8, 8]
    assert [bar.get_x() for bar in axes.patches] == [0, 0, 4, 2]
    assert axes.texts[0].get_text().strip() == "12.0"


def test_a_bill_that_is_longer_than_the_axis_is_cut_and_keeps_its_number():
    axes = plots.plot_bills({"full": {"weights": 100.0}, "LoRA": {"weights": 9.0}}, "", 16.0, 30.0)
    assert axes.get_xlim() == (0, pytest.approx(33.6))
    assert [(label.get_position()[0], label.get_text().strip()) for label in axes.texts] == [
        (30.0, "100.0"),
        (9.0, "9.0"),
    ]
    assert axes.lines[0].get_xdata() == [16.0, 16.0]
    assert "dashed" in axes.get_xlabel()


def test_a_table_shows_text_as_it_is():
    shown = plots.table(
        [{"question": "<b>?", "share": 0.5}, {"question": "two\nlines", "share": 1}]
    )
    assert "&lt;b&gt;?" in shown.data
    assert '<td style="text-align:right;vertical-align:top">0.5</td>' in shown.data
    assert shown.data.count("<tr>") == 3
    assert plots.table([]).data.count("<tr>") == 1


def test_lines_and_points_hold_what_was_given_with_a_color_for_each_name():
    axes = plots.plot_lines(
        {"a": {1: 5.0, 4: 7.0}, "b": {1: 2.0}}, "It rises", "rank", "%", log_x=True
    )
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[1, 5], [4, 7]], [[1, 2]]]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "4"]
    dots = plots.plot_points(
        {"a": {"x": [(1, 5), (2, 6)]}, "b": {"y": [(3, 4)]}}, "They differ", "loss", "%"
    )
    assert [group.get_offsets().tolist() for group in dots.collections] == [
        [[1, 5], [2, 6]],
        [[3, 4]],
    ]
    assert [text.get_text() for text in dots.get_legend().get_texts()] == ["a", "b"]
    assert [(text.get_text(), text.xy) for text in dots.texts] == [("x", (1.5, 5.5)), ("y", (3, 4))]


def test_names_of_points_that_lie_close_do_not_cover_each_other():
    names = {f"name {number}": [(1 + number / 100, 50 + number)] for number in range(1, 5)}
    axes = plots.plot_points(
        {"a": names | {"far": [(100, 50)], "low": [(1, 0)]}},
        "Four are close",
        "loss",
        "%",
        log_x=True,
    )
    axes.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    moved = {text.get_text(): text.get_position()[1] - 3 for text in axes.texts}
    assert (moved["name 1"], moved["far"]) == (0, 0)
    assert moved["name 2"] > 0


def test_seeds_are_dots_around_the_line_of_their_means():
    axes = plots.plot_seeds({"r = 1": {0.1: [1.0, 3.0], 1.0: [5.0]}}, "It rises", "rate", "%")
    assert axes.lines[0].get_xydata().tolist() == [[0.1, 2.0], [1.0, 5.0]]
    dots = [group.get_offsets().tolist() for group in axes.collections]
    assert dots == [[[0.1, 1], [0.1, 3]], [[1, 5]]]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.1", "1"]


def test_bars_show_their_mean_and_every_seed():
    axes = plots.plot_bars({"q": [10.0, 30.0], "all": [80.0]}, "All is best", "%", marked=["all"])
    assert [bar.get_width() for bar in axes.patches] == [20, 80]
    assert [text.get_text().strip() for text in axes.texts] == ["20", "80", "mean"]
    assert sum(len(group.get_offsets()) for group in axes.collections) == 3
    assert axes.patches[0].get_facecolor() != axes.patches[1].get_facecolor()


def test_layers_are_a_row_a_matrix_and_a_column_a_block():
    ranks = {f"layers.{block}.{name}_proj": 4.0 for block in (0, 1, 2) for name in ("q", "down")}
    axes = plots.plot_layers({"before": ranks, "after": ranks}, "Ranks", "rank")
    assert axes.images[0].get_array().shape == (2, 3)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q", "down"]
    assert {text.get_text() for text in axes.texts} == {"4"}


def test_a_block_has_a_green_box_and_a_text_for_each_place_that_is_named():
    plain, full = plots.plot_block({}), plots.plot_block({"prefix": "40", "IA3": "9"})
    assert len(full.patches) - len(plain.patches) == 1 + 3  # keys and values; k, v and down
    assert {text.get_text() for text in full.texts} > {"prefix", "40", "IA3", "9", "attention"}


def test_dots_show_every_seed_the_mean_and_its_number():
    axes = plots.plot_dots({"q": [86.0, 88.0], "all": [90.5]}, "Alike", "%", marked=["all"])
    assert [group.get_offsets().tolist() for group in axes.collections] == [
        [[86, 0], [88, 0]],
        [[90.5, 1]],
    ]
    assert [line.get_xdata().tolist() for line in axes.lines] == [[87, 87], [90.5, 90.5]]
    assert [text.get_text() for text in axes.texts] == ["87.0", "90.5"]


def test_of_three_triplets_one_is_marked():
    axes = plots.plot_triplets(384, 128, rank=3)
    colors = [patch.get_facecolor() for patch in axes.patches]
    assert [colors.count(to_rgba(color)) for color in (ACCENT, PALE)] == [3, 6]
    assert {"P: 384 x 3", "Λ: 3 numbers", "Q: 3 x 128"} <= {text.get_text() for text in axes.texts}
