"""The figures of Day 5, and the tables of its deck that are measured."""

from collections.abc import Callable

from matplotlib.axes import Axes

from course_lib import experiments
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
        "tiny": lambda: picture(notebook, "In 150 steps where weights"),
        "points": lambda: picture(notebook, "plots.plot_points("),
        "far": lambda: picture(notebook, "New words need weights"),
    }


def tables(notebook: Notebook) -> list[list[Row]]:
    """The tables of the deck that are measured."""
    opening = [dict([*row.items()][:4]) for row in table_rows(notebook, "def turn(")]
    heard = [
        {
            name: row[name]
            for name in (
                "prefix",
                "its share of attention, by layer",
                "its longest key",
            )
        }
        for row in table_rows(notebook, "trained, old lengths")
    ]
    in_use = [
        {"in use": row["method"], "time of an answer": row["time of an answer"]}
        for row in table_rows(notebook, 'experiments.read("prefix_costs")')
        if not row["method"].startswith(("IA3", "parallel", "UniPELT", "prompt"))
    ]
    return [opening, heard, live_rows(notebook), today_rows(), in_use]


def live_rows(notebook: Notebook) -> list[Row]:
    """What the four methods reach on tiny in the notebook, where the learner's functions train."""
    rows: list[Row] = []
    for name, weights, scores in (
        ("soft prompt, random", "my_prompt_loss(model", "again.model, TOKENS"),
        ("prefix, from a text", "mine = with_prefix(", "finetune(mine"),
        ("bottlenecks", "finetune(bottled", "finetune(bottled"),
        ("IA3", "finetune(scaled", "finetune(scaled"),
    ):
        (trained,) = found(notebook, weights, r"([\d,]+) of [\d,]+ weights")
        (right,) = found(notebook, scores, r"exact match ([\d.]+) %")
        rows.append({"in 75 steps": name, "weights": trained, "exact match": f"{right} %"})
    rows[1]["in 75 steps"] += ", 150 steps"
    return rows


def today_rows() -> list[Row]:
    """Methods of the day on the task of the week, and what they are compared with."""
    week, today = experiments.read("week"), experiments.read("prefix_week")
    sweep = (
        week.where("untouched", "full fine-tuning")
        + week.where("LoRA", layers="all linear layers")
        + today.where("bottleneck adapters", "IA3", "norm tuning", "prompt tuning")
        + today.where("prefix tuning", start="text")
    )
    short = {
        "response loss, nats": "loss",
        "right topic, %": "topic, %",
        "right answer, %": "answer, %",
        "retention, %": "kept, %",
    }
    return [
        {"method": runs[0].method, "trained": f"{runs[0].trained:,}"}
        | {new: row[name] for name, new in short.items()}
        for row, runs in zip(week_rows(sweep), sweep.by_label().values(), strict=True)
    ]


# --- what the deck says beside its figures and tables


def stated(notebook: Notebook) -> Statements:
    """What the slides say with the notebook's own numbers."""
    text, library, peft = (
        found(
            notebook, "the text in front", rf"your prefix and {name}: logits differ by up to (\S+)"
        )
        for name in ("the text in front", "course_lib", "peft")
    )
    scales = found(notebook, "peft.IA3Config(", r"yours and peft's: logits differ by (\S+)")
    merged = found(notebook, "peft.IA3Config(", r"merged weights: logits differ by (\S+)")
    all_numbers, different = found(
        notebook, 'start="zero")', r"([\d,]+) numbers are trained, ([\d,]+) of them"
    )
    return {
        "Equal to peft": [f"| {value} |" for (value,) in (text, library, peft, scales, merged)],
        "Zeros: twenty": [f"{all_numbers} numbers trained, {different} different"],
    }


def said(notebook: Notebook) -> Statements:
    """What the notes say with them."""
    return {}
