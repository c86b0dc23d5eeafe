"""The figures of Day 5, and the tables of its deck that are measured."""

from collections.abc import Callable

from course_lib import experiments
from matplotlib.axes import Axes
from tools.figures.drawing import (
    Notebook,
    Row,
    Statements,
    found,
    picture,
    table_rows,
    week_rows,
)

NAME = "day5_prefix"


def figures(notebook: Notebook) -> dict[str, Callable[[], Axes | bytes | str]]:
    """What draws each figure of the day."""
    return {
        "block": lambda: picture(notebook, "plots.plot_block("),
        "starts": lambda: picture(notebook, "Where it starts decides which rate"),
        "mlp": lambda: picture(notebook, "An MLP that makes the vectors"),
        "tiny": lambda: picture(notebook, "Where weights act matters"),
        "points": lambda: picture(notebook, "plots.plot_points("),
        "far": lambda: picture(notebook, "New words need weights"),
    }


def tables(notebook: Notebook) -> list[list[Row]]:
    """The tables of the deck that are measured."""
    opening = [dict([*row.items()][:4]) for row in table_rows(notebook, "def turn(")]
    heard = [
        {
            "prefix": row["prefix"],
            "its share of attention, by layer": row["its share of attention, by layer"],
            "gradient": row["gradient"],
        }
        for row in table_rows(notebook, "def watching(")
    ]
    in_use = [
        {"in use": row["method"], "time of an answer": row["time of an answer"]}
        for row in table_rows(notebook, 'experiments.read("prefix_costs")')
    ]
    return [opening, heard, today_rows(), in_use]


def today_rows() -> list[Row]:
    """The methods of the day on the task of the week, and what they are compared with."""
    week = experiments.read("week")
    return week_rows(
        week.where("untouched", "ten examples in the prompt", "full fine-tuning")
        + week.where("LoRA", layers="all linear layers")
        + experiments.read("prefix_week")
    )


# --- what the deck says beside its figures and tables


def stated(notebook: Notebook) -> Statements:
    """What the slides say with the notebook's own numbers."""
    text, library, peft = (
        found(notebook, "def with_prefix(", rf"your prefix and {name}: logits differ by up to (\S+)")
        for name in ("the text in front", "course_lib", "peft")
    )
    scales = found(notebook, "peft.IA3Config(", r"yours and peft's: logits differ by (\S+)")
    merged = found(notebook, "peft.IA3Config(", r"merged weights: logits differ by (\S+)")
    all_numbers, different = found(notebook, 'start="zero")', r"([\d,]+) numbers are trained, ([\d,]+) of them")
    return {
        "Equal to peft": [f"| {value} |" for (value,) in (text, library, peft, scales, merged)],
        "Zeros: twenty": [f"{all_numbers} numbers trained, **{different}** different"],
    }


def said(notebook: Notebook) -> Statements:
    """What the notes say with them."""
    return {}
