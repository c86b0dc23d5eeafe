"""The figures of Day 3, and the tables of its deck that are measured."""

import statistics
from collections.abc import Callable

from matplotlib.axes import Axes

from course_lib import experiments, explorables, plots
from course_lib.experiments import Sweep
from course_lib.plots import PALE
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

NAME = "day3_adalora"
RATE = 2e-2  # AdaLoRA's, on tiny and on the task of the week


def figures(notebook: Notebook) -> dict[str, Callable[[], Axes | bytes | str]]:
    """What draws each figure of the day."""
    return {
        "race": lambda: explorables.page(
            shown(notebook, "explorables.race_of_ranks(", "text/html")
        ),
        "cut": draw_cut,
        "triplets": lambda: plots.plot_triplets(384, 128, rank=3),
        "budget": lambda: picture(notebook, "def as_printed("),
        "penalty": lambda: picture(notebook, "The penalty falls"),
        "criteria": draw_criteria,
        "ranks_tiny": lambda: draw_ranks("adalora_ranks"),
        "ranks_week": lambda: draw_ranks("adalora_week_ranks"),
        "rates": draw_rates,
        "scales": draw_scales,
    }


def tables(notebook: Notebook) -> list[list[Row]]:
    """The tables of the deck that are measured."""
    return [
        table_rows(notebook, "def score_with("),
        table_rows(notebook, "def as_printed("),
        today_rows(),
        audit_rows(),
    ]


# --- what was measured


def today_rows() -> list[Row]:
    week, today = experiments.read("week"), experiments.read("adalora_week")
    rows = week_rows(
        week.where("untouched", "full fine-tuning")
        + week.where("LoRA", layers="all linear layers")
        + today.where("LoRA", rank=12)
        + today.where("AdaLoRA", learning_rate=RATE)
    )
    names = ("untouched", "full fine-tuning", "LoRA, rank 8", "LoRA, rank 12", "AdaLoRA, 12 to 8")
    return [row | {"method": name} for row, name in zip(rows, names, strict=True)]


def audit_rows() -> list[Row]:
    """LoRA of rank 8 and AdaLoRA on the task of the week, by scale and rate."""
    lora = experiments.read("week").where("LoRA", layers="all linear layers")
    rows = []
    for runs in (lora + experiments.read("adalora_week")).by_label().values():
        chosen = runs[0].settings
        if chosen["rank"] != 8:
            continue
        mean = {
            name: statistics.mean(run.scores[name] for run in runs)
            for name in ("right topic", "right answer", "retention")
        }
        row = {"run": runs[0].method, "scale": f"{chosen.get('scale', 2.0):g}"}
        row["rate"] = f"{chosen['learning rate']:g}"
        rows.append(row | {name: f"{value:.0f} %" for name, value in mean.items()})
    return rows


# --- drawings


def by_rate(sweep: Sweep) -> dict[float, list[float]]:
    lines: dict[float, list[float]] = {}
    for run in sweep.outcomes:
        lines.setdefault(run.settings["learning rate"], []).append(run.scores["exact match"])
    return lines


def draw_cut() -> Axes:
    sweep = experiments.read("adalora_cut")
    lines = {
        name: {
            k: [
                run.scores["exact match"]
                for run in sweep.where(kept=kept, largest=largest, cut_to=k).outcomes
            ]
            for k in range(1, 9)
        }
        for name, kept, largest in (
            ("directions in each matrix", "directions", "in each"),
            ("directions of all", "directions", "of all"),
            ("pairs of all", "pairs", "of all"),
        )
    }
    axes = plots.plot_seeds(lines, "", "kept a matrix, on average", "% exact match")
    axes.grid(axis="y", color=PALE)
    return widened(axes)


def draw_criteria() -> Axes:
    criteria, bars = experiments.read("adalora_criteria"), {}
    names = dict.fromkeys(run.settings["pruned by"] for run in criteria.outcomes)
    for rank, left in ((4, "112 triplets"), (0.25, "7 triplets")):
        ways = {name: criteria.where(rank=rank, pruned_by=name) for name in names}
        ways["AdaLoRA's, without the penalty"] = experiments.read("adalora_no_penalty").where(
            rank=rank
        )
        ways["LoRA, its smallest pairs"] = experiments.read("adalora_pairs").where(rank=rank)
        for name, runs in ways.items():
            if runs.outcomes:
                bars[f"{left}: {name}"] = [run.scores["exact match"] for run in runs.outcomes]
    own = [name for name in bars if name.endswith("× uncertainty")]
    return widened(plots.plot_dots(bars, "", "% exact match", own))


def draw_ranks(sweep: str) -> Axes:
    """Mean and spread of each matrix's rank over the seeds."""
    runs = [run.scores for run in experiments.read(sweep).outcomes]
    values = {path: [scores[path] for scores in runs] for path in runs[0]}
    panels = {
        "mean of three runs": {path: statistics.mean(v) for path, v in values.items()},
        "standard deviation": {path: statistics.stdev(v) for path, v in values.items()},
    }
    panels = {
        name: {path: round(value, 1) for path, value in ranks.items()}
        for name, ranks in panels.items()
    }
    return widened(plots.plot_layers(panels, "", "rank"))


def draw_rates() -> Axes:
    sweep = experiments.read("adalora_budgets")
    lines = {f"LoRA, rank {rank}": by_rate(sweep.where("LoRA", rank=rank)) for rank in (4, 8)}
    lines["AdaLoRA, 8 to 4"] = by_rate(sweep.where("AdaLoRA"))
    axes = plots.plot_seeds(lines, "", "learning rate", "% exact match")
    axes.grid(axis="y", color=PALE)
    return widened(axes)


def draw_scales() -> Axes:
    sweep = experiments.read("adalora_scales")
    lines = {
        f"{method}, scale {scale:g}": by_rate(sweep.where(method, scale=scale))
        for scale in (0.125, 2.0)
        for method in ("LoRA", "AdaLoRA")
    }
    axes = plots.plot_seeds(lines, "", "learning rate", "% exact match")
    axes.grid(axis="y", color=PALE)
    return widened(axes)


# --- what the deck says beside its figures and tables


def stated(notebook: Notebook) -> Statements:
    """What the slides say with the notebook's own numbers."""
    weights = [
        found(
            notebook,
            "def loss_of(w)",
            rf"w = {weight}: \|w dL/dw\| = ([\d.]+); if it becomes 0, the loss changes by ([\d.]+)",
        )
        for weight in ("2.0", "0.3")
    ]
    agree, prunings = found(notebook, "their_run = ", r"triplets after (\d+) of (\d+) prunings")
    assert agree == prunings
    (right,) = found(notebook, "penalties, cosines, validation", r"540 questions: ([\d.]+) %;")
    left, start = found(
        notebook, "penalties, cosines, validation", r"triplets left: (\d+) of (\d+)"
    )
    return {
        "Small weights": [
            f"| {weight} | {first} | {true} |"
            for weight, (first, true) in zip(("2.0", "0.3"), weights, strict=True)
        ],
        "The core in code": [f"same triplets as peft: {prunings} of {prunings} prunings"],
        "It trains": [f"{right} % exact match with {left} of {start} triplets"],
    }


def said(notebook: Notebook) -> Statements:
    """What the notes say with them."""
    criteria = experiments.read("adalora_criteria")
    shares = {
        (rank, by): round(criteria.where(rank=rank, pruned_by=by).mean("exact match"))
        for rank in (4, 0.25)
        for by in ("chance", "sensitivity × uncertainty")
    }
    (first,) = found(notebook, "largest change of a logit", r"mean of the 56 norms: ([\d.]+)")
    return {
        "It trains": [f"begins at {first}"],
        "The choice matters": [
            "With 112 triplets, chance gets {} percent and AdaLoRA's score {}".format(
                *[*shares.values()][:2]
            ),
            "chance gets {} percent and AdaLoRA's score {}, and that".format(
                *[*shares.values()][2:]
            ),
        ],
    }
