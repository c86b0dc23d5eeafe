"""The figures of Day 4, and the tables of its deck that are measured."""

from collections.abc import Callable

from matplotlib.axes import Axes

from course_lib import experiments, explorables, plots
from tools.figures.drawing import (
    Notebook,
    Row,
    Statements,
    found,
    picture,
    shown,
    table_rows,
    week_rows,
    widened,
)

NAME = "day4_qlora"


def figures(notebook: Notebook) -> dict[str, Callable[[], Axes | bytes | str]]:
    """What draws each figure of the day."""
    return {
        "block": lambda: explorables.page(
            shown(notebook, "explorables.block_of_weights(", "text/html")
        ),
        "normal": lambda: picture(notebook, "quantiles: on the line is normal"),
        "levels": lambda: picture(notebook, "NF4's levels are dense"),
        "use": lambda: picture(notebook, "No code gets its sixteenth"),
        "blocks": lambda: picture(notebook, "Smaller blocks: less error"),
        "curve": lambda: picture(notebook, "Your QLoRA: from"),
        "down": draw_down,
        "bills": lambda: picture(notebook, "Four bits shrink the weights, checkpointing"),
        "audit": lambda: picture(notebook, "At equal bits: Lloyd"),
    }


def tables(notebook: Notebook) -> list[list[Row]]:
    """The tables of the deck that are measured."""
    return [today_rows(), merge_rows(), table_rows(notebook, "error_of = ")]


# --- what was measured


def today_rows() -> list[Row]:
    week = experiments.read("week")
    rows = week_rows(
        week.where("untouched", "full fine-tuning")
        + week.where("LoRA", layers="all linear layers")
        + experiments.read("qlora_week")
    )
    names = ("untouched", "full fine-tuning", "LoRA", "untouched, NF4", "QLoRA, NF4")
    return [row | {"method": name} for row, name in zip(rows, names, strict=True)]


def merge_rows() -> list[Row]:
    """QLoRA on the task of the week, as trained and after each merge."""
    rows = week_rows(experiments.read("qlora_week_merges"))
    names = (
        *("as trained", "1. dequantised", "2. original"),
        *("3. dequantised, again", "4. original, once"),
    )
    merged = zip(rows, names, strict=True)
    return [{"merged into": name} | dict([*row.items()][2:]) for row, name in merged]


# --- drawings


def draw_down() -> Axes:
    formats, after = experiments.read("qlora_formats"), experiments.read("qlora_rounded")
    moved = experiments.read("qlora_moved")
    dots = {}
    for name in ("float32", "NF4", "INT4", "INT3", "INT2"):
        ways = {
            "rounded after training": after.where(format=name),
            "moved to the rounded": moved.where(format=name),
            "trained on the rounded": experiments.at_best_rates(
                formats.where(base=f"base in {name}"), "exact match"
            ),
        }
        for what, sweep in ways.items():
            dots[f"{name}: {what}"] = [run.scores["exact match"] for run in sweep.outcomes]
    green = [name for name in dots if name.endswith("trained on the rounded")]
    return widened(plots.plot_dots(dots, "", "% exact match", green))


# --- what the deck says beside its figures and tables


def stated(notebook: Notebook) -> Statements:
    """What the slides say with the notebook's own numbers."""
    opening = [[*row.values()][:3] for row in table_rows(notebook, "QUESTIONS = ")]
    equal, total = found(notebook, "bytes of the whole model", r"yours: ([\d,]+) of ([\d,]+)")
    assert equal == total
    once, twice = found(
        notebook, "quantize_constants", r"weight: ([\d.]+), again quantised (\S+)\n"
    )
    (right,) = found(notebook, "three committed runs each", r"exact match: ([\d.]+) %")
    needed = [
        found(notebook, "linear, rest =", rf"{name}: ([\d.]+) GB")[0]
        for name in ("all weights trained", "LoRA on 16 bits", "QLoRA")
    ]
    return {
        "The same four bits": [
            f"| {way} | {size} | {reply.splitlines()[0][:17]}" for way, size, reply in opening
        ],
        "Quantise the constants": [f"{once} → {twice} bits"],
        "The core in code": [f"{equal} of {total} bytes"],
        "It trains": [f"{right} % exact match"],
        "What fits": [f"| {size} GB |" for size in needed],
    }


def said(notebook: Notebook) -> Statements:
    """What the notes say with them."""
    kept = [
        found(notebook, "kept for the backward pass", rf"{name}: ([\d.]+) MB kept")[0]
        for name in ("LoRA on float32", "your layers", "course_lib's")
    ]
    changed, codes = found(
        notebook, "changed = total = 0", r"([\d,]+) of (\d+),[\d,]+ codes change"
    )
    return {
        "Four ways to merge": [f"of {codes} million codes only {changed} changed"],
        "A trap": [f"{kept[1]} megabytes with yours, {kept[2]} with the package's"],
    }
