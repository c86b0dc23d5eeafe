"""The figures of Day 2, and the tables of its deck that are measured."""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import torch
from day1_figures import headline
from drawing import (
    MASKED,
    MUTED,
    TRAINED,
    WIDE,
    Notebook,
    Row,
    arrow,
    box,
    canvas,
    printed,
    read_notebook,
    table_rows,
    week_rows,
    widened,
)
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from course_lib import experiments, plots, surgery
from course_lib.experiments import Outcome
from course_lib.plots import ACCENT, GOOD, INK, PALE

NAME = "day2_lora"
WEEK = "untouched|full fine-tuning|last .*|LoRA .*"  # the methods of Days 1 and 2
ROWS, COLUMNS, RANK = 500, 200, 3  # the example of section 2.2
NEW_WORDS = {  # label: effect and method
    "LoRA, r = 1": ("new_vocabulary", "r=1, 0.005"),
    "LoRA, r = 16": ("new_vocabulary", "r=16, 0.005"),
    "LoRA, r = 128 (no limit)": ("vocabulary", "LoRA r=128, 0.002"),
    "all but the embeddings": ("vocabulary", "full, embeddings frozen, 0.001"),
    "all weights": ("new_vocabulary", "full fine-tuning, 0.001"),
    "LoRA, r = 16, and embeddings": ("vocabulary", "LoRA r=16 and embeddings, 0.005"),
}


def figures(notebook: Notebook) -> dict[str, Callable[[], Axes]]:
    """What draws each figure of the day."""
    return {
        "energy": draw_energy,
        "shapes": draw_shapes,
        "start": lambda: draw_start(notebook),
        "rates": draw_rates,
        "where": draw_where,
        "forgetting": draw_forgetting,
        "new_words": draw_new_words,
        "blend": lambda: draw_blend(notebook),
        "fusion": lambda: draw_fusion(notebook),
    }


def tables(notebook: Notebook) -> list[list[Row]]:
    """The tables of the deck that are measured."""
    return [cut_rows(), result_rows(notebook), week_rows(WEEK), rank_rows(), merge_rows(notebook), checkpoint_rows(notebook)]


# --- what was measured


def effect(name: str, file: str = experiments.LORA_FILE) -> dict[str, list[Outcome]]:
    """The runs of an effect by method, in the order of the file."""
    outcomes = experiments.read_effect(name, file)
    return {method: [o for o in outcomes if o.method == method] for method in dict.fromkeys(o.method for o in outcomes)}


def percents(runs: Sequence[Outcome], measure: str = "exact match") -> list[float]:
    return [100 * run.scores[measure] for run in runs]


def updates() -> dict[str, dict[int, dict[str, float]]]:
    """Scores of "tiny" and "small" with k directions of their updates: model -> k -> scores."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for method, (run,) in effect("update").items():
        model, k = method.split(", k=")
        found.setdefault(model, {})[int(k)] = run.scores
    return found


def random_energy(k: int) -> float:
    """Percent of the energy in the first k directions of a random matrix as large as those of `tiny`, the notebook's."""
    squares = torch.linalg.svdvals(torch.randn(128, 128, generator=torch.Generator().manual_seed(0))) ** 2
    return round(100 * (squares[:k].sum() / squares.sum()).item(), 1)


def best_rates() -> dict[int, tuple[str, list[Outcome]]]:
    """Of each rank on `tiny` the learning rate with the best mean exact match, and its runs."""
    best: dict[int, tuple[str, list[Outcome]]] = {}
    for method, runs in effect("rank and rate").items():
        rank, rate = re.fullmatch(r"r=(\d+), (.*)", method).groups()
        if int(rank) not in best or statistics.mean(percents(runs)) > statistics.mean(percents(best[int(rank)][1])):
            best[int(rank)] = rate, runs
    return best


# --- tables


def cut_rows() -> list[Row]:
    rows = []
    for k in (0, 1, 2, 4, 8, 128):
        row: Row = {"directions kept": k}
        for model, label in (("tiny", "tiny"), ("small", "SmolLM2")):
            scores = updates()[model][k]
            row |= {f"{measure}, {label}": f"{100 * scores[measure]:.0f} %" for measure in ("energy", "exact match")}
        rows.append(row)
    return rows


def result_rows(notebook: Notebook) -> list[Row]:
    """The untouched model and Day 1's on the hundred questions, as Day 1 printed them, and today's."""
    text = printed(notebook, 'print("retention", evaluation.percent(')
    today = dict(re.findall(r"(valid JSON|right topic|right answer|retention) (\d+) ±", text))
    rows = []
    for measure, (before, after) in headline(read_notebook("day1_alpaca")).items():
        free = " (free form)" if measure == "right answer" else ""
        asked = " (today of 60)" if measure == "retention" else ""
        rows.append([measure + asked, f"{before} %{free}", f"{after} %", f"{today[measure]} %"])
    (full,) = {outcome.trained for outcome in experiments.read_outcomes() if outcome.method == "full fine-tuning"}
    rows.append(["weights trained", "0", f"{full:,}", re.search(r"([\d,]+) weights trained", text)[1]])
    return [dict(zip(("of 100 questions", "untouched", "Day 1: all weights", "today: LoRA"), row, strict=True)) for row in rows]


def rank_rows() -> list[Row]:
    runs = {method: found for method, found in effect("rank of the week").items() if method.startswith("LoRA r=")}
    week = [outcome for outcome in experiments.read_outcomes() if outcome.method == "LoRA r=8, all linear layers"]
    of_rank = {int(re.match(r"LoRA r=(\d+)", method)[1]): found for method, found in runs.items()} | {8: week}
    tiny = best_rates()
    rows = []
    for rank in sorted(tiny | of_rank):
        rate, found = tiny.get(rank, ("", []))
        row: Row = {"rank": rank, "tiny: exact match": f"{experiments.spread(percents(found), '.1f')} at {rate}" if rate else ""}
        for measure in ("right topic", "right answer", "retention"):
            values = percents(of_rank[rank], measure) if rank in of_rank else []
            row[f"SmolLM2: {measure}" if measure == "right topic" else measure] = (
                experiments.spread(values, ".1f") if values else ""
            )
        rows.append(row)
    return rows


def merge_rows(notebook: Notebook) -> list[Row]:
    found = re.findall(
        r"'(base|with adapter|merged)': '(\d+ ms)'", printed(notebook, 'for name in ("base", "with adapter", "merged")')
    )
    return [{"one forward pass": name, "median of 5": time} for name, time in found]


def checkpoint_rows(notebook: Notebook) -> list[Row]:
    return table_rows(notebook, "memory.checkpoint_blocks(base.model, count)")


# --- drawings


def draw_energy() -> Axes:
    lines = {
        label: {k: 100 * scores["energy"] for k, scores in updates()[model].items() if k > 0}
        for model, label in (("tiny", "update of tiny"), ("small", "Day 1's update of SmolLM2"))
    }
    lines["random 128 x 128 matrix"] = {k: random_energy(k) for k in lines["update of tiny"]}
    axes = widened(plots.plot_lines(lines, "", "directions kept (k)", "% of the energy", log_x=True))
    axes.set(ylim=(0, 104))
    axes.grid(axis="y", color=PALE)
    return axes


def draw_shapes() -> Axes:
    """The three matrices of section 2.2; the thin sides are drawn wider than true, or they would not be seen."""
    axes = canvas(11, 5)
    height, width, thin = 3.6, 3.6 * COLUMNS / ROWS, 0.26
    trained = surgery.lora_parameters([(ROWS, COLUMNS)], RANK)
    for x, text in ((0.75, "h  ="), (4.0, "x  +"), (5.75, "(alpha / r)"), (10.3, "x")):
        axes.text(x, 2.4, text, size=26, color=INK, ha="center", va="center")
    box(axes, 2.4, 2.4, width, height, "W0\nfrozen", MASKED, size=22)
    box(axes, 7.3, 2.4, thin, height, "", ACCENT)
    box(axes, 9.0, 2.4, width, thin, "", GOOD)
    axes.text(2.4, 4.55, f"{ROWS} x {COLUMNS} = {ROWS * COLUMNS:,}", ha="center", color=MUTED)
    axes.text(7.3, 4.55, f"B: {ROWS} x {RANK} = {ROWS * RANK:,}", ha="center", color=ACCENT, weight="bold")
    axes.text(9.0, 2.75, f"A: {RANK} x {COLUMNS} = {RANK * COLUMNS}", ha="center", color=GOOD, weight="bold")
    axes.text(7.3, 0.12, "starts at zero", ha="center", color=ACCENT)
    axes.text(9.0, 1.85, "starts random", ha="center", color=GOOD)
    axes.text(9.35, 0.75, f"trained: {trained:,}", ha="center", color=INK, size=20, weight="bold")
    return axes


def draw_start(notebook: Notebook) -> Axes:
    """Three ways to start, and what the notebook finds: is the model unchanged, which matrix has a gradient."""
    verdicts = {
        "A random, B zero": "trains, and starts\nas the base",
        "both random": "trains, but starts\nas another model",
        "both zero": "never trains",
    }
    axes = canvas(11, 4.4)
    for x, text in ((4.35, "logits\nunchanged"), (5.95, "A has a\ngradient"), (7.45, "B has a\ngradient")):
        axes.text(x, 3.95, text, ha="center", va="center", color=INK)
    rows = [row for row in table_rows(notebook, '"logits unchanged"') if row["start"] in verdicts]
    for row, y in zip(rows, (2.95, 1.75, 0.55), strict=True):
        zero = {"A": row["start"] == "both zero", "B": row["start"] != "both random"}
        for name, x, width, height in (("B", 0.45, 0.36, 0.95), ("A", 1.4, 1.1, 0.36)):
            face = MASKED if zero[name] else GOOD
            box(axes, x, y, width, height, "0" if zero[name] else name, face, color=MUTED if zero[name] else "white", weight="bold")
        axes.text(2.2, y, row["start"].replace(", ", ",\n"), va="center", color=INK)
        for x, column in ((4.35, "logits unchanged"), (5.95, "A has a gradient"), (7.45, "B has a gradient")):
            yes = row[column] == "True"
            axes.text(x, y, "yes" if yes else "no", ha="center", va="center", color=GOOD if yes else ACCENT, weight="bold", size=19)
        axes.text(8.5, y, verdicts[row["start"]], va="center", color=INK)
    return axes


def draw_rates() -> Axes:
    """Exact match of every run on `tiny`, by rank and learning rate; the mean of three seeds is written above them."""
    colors = {"0.002": INK, "0.005": ACCENT, "0.01": GOOD}
    _, axes = plt.subplots(figsize=WIDE, layout="constrained")
    found = effect("rank and rate")
    ranks = list(dict.fromkeys(method.partition(",")[0] for method in found))
    for place, rank in enumerate(ranks):
        rates = [method.partition(", ")[2] for method in found if method.partition(",")[0] == rank]
        for column, rate in enumerate(rates):
            x, values = place + 0.26 * (column - (len(rates) - 1) / 2), percents(found[f"{rank}, {rate}"])
            axes.scatter([x] * len(values), values, color=colors[rate], s=45)
            axes.text(x, max(values) + 1.2, f"{statistics.mean(values):.0f}", ha="center", color=colors[rate], weight="bold")
    for rate, color in colors.items():
        axes.scatter([], [], color=color, label=f"learning rate {rate}")
    axes.set(xticks=range(len(ranks)), xticklabels=[rank.replace("=", " = ") for rank in ranks], ylim=(66, 95))
    axes.set(ylabel="% exact match", xlim=(-0.5, len(ranks) - 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(colors), loc="upper center", bbox_to_anchor=(0.5, -0.1))
    return axes


def draw_where() -> Axes:
    found = effect("where")
    labels = {method: f"{method.removeprefix('LoRA on ')}: {runs[0].trained:,}" for method, runs in found.items()}
    colors = [GOOD if "LoRA" in method else PALE for method in found]
    return draw_bars({labels[method]: percents(runs) for method, runs in found.items()}, colors, "% exact match")


def draw_new_words() -> Axes:
    runs = {}
    for label, (name, method) in NEW_WORDS.items():
        file = experiments.EFFECTS_FILE if name == "new_vocabulary" else experiments.LORA_FILE
        runs[label] = effect(name, file)[method]
    with_embeddings = ("all weights", "LoRA, r = 16, and embeddings")
    colors = [GOOD if label in with_embeddings else PALE for label in runs]
    axes = draw_bars({label: percents(found) for label, found in runs.items()}, colors, "% of 120 words known")
    for color, label in ((GOOD, "embeddings train"), (PALE, "embeddings frozen")):
        axes.barh([0], [0], color=color, label=label)
    axes.legend(frameon=False, loc="upper right")
    return axes


def draw_bars(values: Mapping[str, Sequence[float]], colors: Sequence[str], xlabel: str) -> Axes:
    """A bar a row: the mean, with its number, and a dot a seed."""
    _, axes = plt.subplots(figsize=WIDE, layout="constrained")
    means = [statistics.mean(seeds) for seeds in values.values()]
    axes.barh(list(values), means, color=colors, height=0.66)
    for row, (mean, seeds) in enumerate(zip(means, values.values(), strict=True)):
        axes.scatter(seeds, [row] * len(seeds), color="white", edgecolor=INK, s=45, zorder=3)
        axes.text(max(seeds) + 1.5, row, f"{mean:.0f}", va="center", color=INK, weight="bold")
    axes.invert_yaxis()
    axes.set(xlabel=xlabel, xlim=(0, 108), xticks=range(0, 101, 20))
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def draw_forgetting() -> Axes:
    """Runs of the task of the week at three learning rates each: what they learned, and what they kept."""
    runs = [*experiments.read_outcomes(), *experiments.read_effect("forgetting", experiments.LORA_FILE)]
    chosen = [run for run in runs if run.method.startswith(("full fine-tuning", "LoRA r=8, all linear layers"))]
    points = experiments.learned_and_kept(chosen)
    axes = widened(plots.plot_points(points, "", "response loss on the task (nats): left is better", "% retained"))
    axes.grid(color=PALE)
    return axes


def draw_blend(notebook: Notebook) -> Axes:
    shares = {}
    for row in table_rows(notebook, "for opening, close in ("):
        opening, close = row["weights"].split(" / ")
        counts = {"opens": row["opens"], "closes": row["closes"], "both": row["both"]}
        shares[f"opening {opening}\nclose {close}"] = {name: int(count) / int(row["of"]) for name, count in counts.items()}
    axes = widened(plots.plot_shares(shares, ""))
    axes.set(ylabel="% of replies")
    axes.tick_params(axis="x", labelsize=14.5)
    return axes


def draw_fusion(notebook: Notebook) -> Axes:
    """The first fused batch of the notebook: each job's row through the one base, and through its own adapter."""
    first = printed(notebook, "fusion.schedule(jobs").partition("budget 320:\n")[2].splitlines()[0]
    tokens = {job: int(count) for job, count in re.findall(r"'(\w+)': (\d+)", first)}
    axes = canvas(11, 4.6)
    for x, text in ((1.75, "one row a job, padded"), (5.35, "one product,\nall rows"), (7.75, "own A and B,\nown row")):
        axes.text(x, 4.2, text, ha="center", va="center", color=INK)
    axes.text(10.1, 4.2, "own loss", ha="center", va="center", color=INK)
    box(axes, 5.35, 1.85, 1.5, 3.6, "W0", MASKED, size=24, weight="bold")
    ys = [3.25 - 0.93 * place for place in range(len(tokens))]
    for (job, count), y, color in zip(tokens.items(), ys, (GOOD, ACCENT, INK, MUTED), strict=True):
        full = 3.3
        own = full * count / max(tokens.values())
        axes.add_patch(Rectangle((0.1, y - 0.28), full, 0.56, facecolor="none", edgecolor=PALE, hatch="///", linewidth=0))
        box(axes, 0.1 + own / 2, y, own, 0.56, f"{job}: {count} tokens", color, color="white", size=15)
        arrow(axes, (3.5, y), (4.58, y), color)
        arrow(axes, (6.12, y), (6.95, y), color)
        axes.text(6.5, y + 0.1, "+", ha="center", va="bottom", color=color, weight="bold")
        box(axes, 7.32, y, 0.22, 0.62, "", color)
        box(axes, 8.05, y, 0.9, 0.22, "", color)
        arrow(axes, (8.65, y), (9.55, y), color)
        box(axes, 10.1, y, 1.0, 0.5, "loss", TRAINED)
    return axes
