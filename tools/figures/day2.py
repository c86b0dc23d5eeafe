"""The figures of Day 2, and the tables of its deck that are measured."""

import re
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from course_lib import experiments, plots, surgery
from course_lib.experiments import Sweep
from course_lib.plots import ACCENT, GOOD, INK, PALE
from tools.figures.drawing import (
    MASKED,
    MUTED,
    TRAINED,
    WIDE,
    Notebook,
    Row,
    Statements,
    arrow,
    box,
    canvas,
    centred,
    found,
    headline,
    printed,
    read_notebook,
    table_rows,
    week_rows,
    widened,
)

NAME = "day2_lora"
WEEK = ("untouched", "full fine-tuning", "last blocks", "LoRA")  # the methods of Days 1 and 2
ROWS, COLUMNS, RANK = 500, 200, 3  # the example of section 2.2
FOUND_TRUE = {  # what a cell printed, and the deck says
    "losses = [objective.supervised_loss(model, batch)": "difference of the losses below 1e-6: "
    "True",
    "library = theirs.get_submodule": "gradients equal to 1e-6: True",
    "merged = lora.merged_copy(base.model)": "logit below 1e-3: True",
    "fusion.train_fused(together": "losses equal to 1e-4: True",
}
NEW_WORDS = {  # label: sweep, method and settings
    "LoRA, r = 1": ("tiny_new_vocabulary", "LoRA", {"rank": 1}),
    "LoRA, r = 16": ("tiny_new_vocabulary", "LoRA", {"rank": 16, "learning_rate": 5e-3}),
    "LoRA, r = 128 (no limit)": ("lora_vocabulary", "LoRA", {"rank": 128}),
    "all but the embeddings": ("lora_vocabulary", "full fine-tuning", {}),
    "all weights": ("tiny_new_vocabulary", "full fine-tuning", {"learning_rate": 1e-3}),
    "LoRA, r = 16, and embeddings": ("lora_vocabulary", "LoRA", {"rank": 16}),
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
    return [
        cut_rows(),
        result_rows(notebook),
        week_rows(*WEEK),
        rank_rows(),
        merge_rows(notebook),
        checkpoint_rows(notebook),
    ]


# --- what was measured


def values(sweep: Sweep, measure: str = "exact match") -> list[float]:
    """Of every outcome, in the measure's unit."""
    return [outcome.scores[measure] for outcome in sweep.outcomes]


def directions(model: str) -> dict[int, dict[str, float]]:
    """Scores of "tiny" or "smollm2" with k directions of their updates, by k."""
    return {
        outcome.settings["directions"]: outcome.scores
        for outcome in experiments.read(f"lora_update_{model}").outcomes
    }


def random_energy(k: int) -> float:
    """Percent of the energy in the first k directions of a random matrix as large as those of
    `tiny`, the notebook's.
    """
    squares = (
        torch.linalg.svdvals(torch.randn(128, 128, generator=torch.Generator().manual_seed(0))) ** 2
    )
    return round(100 * (squares[:k].sum() / squares.sum()).item(), 1)


def best_rates() -> dict[int, Sweep]:
    """Of each rank on `tiny` the runs at the learning rate with the best mean exact match."""
    sweep = experiments.read("lora_rank_and_rate")
    best: dict[int, Sweep] = {}
    for runs in sweep.by_label().values():
        settings = runs[0].settings
        found = sweep.where(rank=settings["rank"], learning_rate=settings["learning rate"])
        before = best.get(settings["rank"])
        if before is None or found.mean("exact match") > before.mean("exact match"):
            best[settings["rank"]] = found
    return best


# --- tables


def cut_rows() -> list[Row]:
    rows = []
    for k in (0, 1, 2, 4, 8, 128):
        row: Row = {"directions kept": k}
        for model, label in (("tiny", "tiny"), ("smollm2", "SmolLM2")):
            scores = directions(model)[k]
            row |= {
                f"{measure}, {label}": f"{scores[measure]:.0f} %"
                for measure in ("energy", "exact match")
            }
        rows.append(row)
    return rows


def result_rows(notebook: Notebook) -> list[Row]:
    """The untouched model, Day 1's, as Day 1 found them on its hundred questions, and today's."""
    yesterday, today = headline(read_notebook("day1_alpaca")), headline(notebook)
    rows = []
    for measure in ("valid JSON", "right topic", "right answer", "retention"):
        free = " (free form)" if measure == "right answer" else ""
        asked = f" (today of {today[measure]['questions']})" if measure == "retention" else ""
        before, after = (f"{yesterday[measure][when]:.0f} %" for when in ("before", "after"))
        rows.append([measure + asked, before + free, after, f"{today[measure]['after']:.0f} %"])
    (full,) = {
        outcome.trained for outcome in experiments.read("week").where("full fine-tuning").outcomes
    }
    rows.append(["weights trained", "0", f"{full:,}", f"{today['weights trained']['after']:,}"])
    head = ("of 100 questions", "untouched", "Day 1: all weights", "today: LoRA")
    return [dict(zip(head, row, strict=True)) for row in rows]


def rank_rows() -> list[Row]:
    week = experiments.read("lora_rank_of_the_week") + experiments.read("week").where(
        "LoRA", layers="all linear layers"
    )
    tiny, rows = best_rates(), []
    for rank in sorted(tiny | dict.fromkeys([8])):
        found, row = tiny.get(rank), {"rank": rank, "tiny: exact match": ""}
        if found:
            rate = found.outcomes[0].settings["learning rate"]
            row["tiny: exact match"] = f"{experiments.spread(values(found), 1)} at {rate:g}"
        for measure in ("right topic", "right answer", "retention"):
            of_rank = values(week.where(rank=rank), measure)
            name = f"SmolLM2: {measure}" if measure == "right topic" else measure
            row[name] = experiments.spread(of_rank, 1) if of_rank else ""
        rows.append(row)
    return rows


def merge_rows(notebook: Notebook) -> list[Row]:
    found = re.findall(
        r"'(base|with adapter|merged)': '(\d+ ms)'",
        printed(notebook, 'for name in ("base", "with adapter", "merged")'),
    )
    return [{"one forward pass": name, "median of 5": time} for name, time in found]


def checkpoint_rows(notebook: Notebook) -> list[Row]:
    return table_rows(notebook, "memory.checkpoint_blocks(base.model, count)")


# --- drawings


def draw_energy() -> Axes:
    lines = {
        label: {k: scores["energy"] for k, scores in directions(model).items() if k > 0}
        for model, label in (("tiny", "update of tiny"), ("smollm2", "Day 1's update of SmolLM2"))
    }
    lines["random 128 x 128 matrix"] = {k: random_energy(k) for k in lines["update of tiny"]}
    axes = widened(
        plots.plot_lines(lines, "", "directions kept (k)", "% of the energy", log_x=True)
    )
    axes.set(ylim=(0, 104))
    axes.grid(axis="y", color=PALE)
    return axes


def draw_shapes() -> Axes:
    """The three matrices of section 2.2; the thin sides are drawn wider than true, or they would
    not be seen.
    """
    axes = canvas(11, 5)
    height, width, thin = 3.6, 3.6 * COLUMNS / ROWS, 0.26
    trained = surgery.lora_parameters([(ROWS, COLUMNS)], RANK)
    for x, text in ((0.75, "h  ="), (4.0, "x  +"), (5.75, "(alpha / r)"), (10.3, "x")):
        centred(axes, x, 2.4, text, size=26)
    box(axes, 2.4, 2.4, width, height, "W0\nfrozen", MASKED, size=22)
    box(axes, 7.3, 2.4, thin, height, "", ACCENT)
    box(axes, 9.0, 2.4, width, thin, "", GOOD)
    for x, y, text, color, weight in (
        (2.4, 4.55, f"{ROWS} x {COLUMNS} = {ROWS * COLUMNS:,}", MUTED, "normal"),
        (7.3, 4.55, f"B: {ROWS} x {RANK} = {ROWS * RANK:,}", ACCENT, "bold"),
        (9.0, 2.75, f"A: {RANK} x {COLUMNS} = {RANK * COLUMNS}", GOOD, "bold"),
        (7.3, 0.12, "starts at zero", ACCENT, "normal"),
        (9.0, 1.85, "starts random", GOOD, "normal"),
    ):
        axes.text(x, y, text, ha="center", color=color, weight=weight)
    axes.text(9.35, 0.75, f"trained: {trained:,}", ha="center", color=INK, size=20, weight="bold")
    return axes


def draw_start(notebook: Notebook) -> Axes:
    """Three ways to start, and what the notebook finds: is the model unchanged, which matrix has a
    gradient.
    """
    verdicts = {
        "A random, B zero": "trains, and starts\nas the base",
        "both random": "trains, but starts\nas another model",
        "both zero": "never trains",
    }
    axes = canvas(11, 4.4)
    columns = {"logits unchanged": 4.35, "A has a gradient": 5.95, "B has a gradient": 7.45}
    for column, x in columns.items():
        centred(axes, x, 3.95, textwrap.fill(column, 9))
    rows = [row for row in table_rows(notebook, '"logits unchanged"') if row["start"] in verdicts]
    for row, y in zip(rows, (2.95, 1.75, 0.55), strict=True):
        zero = {"A": row["start"] == "both zero", "B": row["start"] != "both random"}
        for name, x, width, height in (("B", 0.45, 0.36, 0.95), ("A", 1.4, 1.1, 0.36)):
            text, face, color = ("0", MASKED, MUTED) if zero[name] else (name, GOOD, "white")
            box(axes, x, y, width, height, text, face, color=color, weight="bold")
        axes.text(2.2, y, row["start"].replace(", ", ",\n"), va="center", color=INK)
        for column, x in columns.items():
            text, color = ("yes", GOOD) if row[column] == "True" else ("no", ACCENT)
            centred(axes, x, y, text, color=color, weight="bold", size=19)
        axes.text(8.5, y, verdicts[row["start"]], va="center", color=INK)
    return axes


def draw_rates() -> Axes:
    """Exact match of every run on `tiny`, by rank and learning rate; the mean of three seeds is
    written above them.
    """
    colors = {0.002: INK, 0.005: ACCENT, 0.01: GOOD}
    _, axes = plt.subplots(figsize=WIDE, layout="constrained")
    sweep = experiments.read("lora_rank_and_rate")
    ranks = list(dict.fromkeys(outcome.settings["rank"] for outcome in sweep.outcomes))
    for place, rank in enumerate(ranks):
        rates = sorted(
            {outcome.settings["learning rate"] for outcome in sweep.where(rank=rank).outcomes}
        )
        for column, rate in enumerate(rates):
            runs = sweep.where(rank=rank, learning_rate=rate)
            x = place + 0.26 * (column - (len(rates) - 1) / 2)
            axes.scatter([x] * len(values(runs)), values(runs), color=colors[rate], s=45)
            mean = f"{runs.mean('exact match'):.0f}"
            axes.text(
                x, max(values(runs)) + 1.2, mean, ha="center", color=colors[rate], weight="bold"
            )
    for rate, color in colors.items():
        axes.scatter([], [], color=color, label=f"learning rate {rate}")
    axes.set(xticks=range(len(ranks)), xticklabels=[f"r = {rank}" for rank in ranks], ylim=(66, 95))
    axes.set(ylabel="% exact match", xlim=(-0.5, len(ranks) - 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(colors), loc="upper center", bbox_to_anchor=(0.5, -0.1))
    return axes


def draw_where() -> Axes:
    bars, colors = {}, []
    for runs in experiments.read("lora_where").by_label().values():
        settings, lora = runs[0].settings, runs[0].method == "LoRA"
        blocks = f"last {settings.get('blocks')} of 4 blocks in full"
        name = f"{settings['layers']}, r={settings['rank']}" if lora else blocks
        bars[f"{name}: {runs[0].trained:,}"] = [run.scores["exact match"] for run in runs]
        colors.append(GOOD if lora else PALE)
    return draw_bars(bars, colors, "% exact match")


def draw_new_words() -> Axes:
    bars = {
        label: values(experiments.read(name).where(method, **settings))
        for label, (name, method, settings) in NEW_WORDS.items()
    }
    with_embeddings = ("all weights", "LoRA, r = 16, and embeddings")
    colors = [GOOD if label in with_embeddings else PALE for label in bars]
    axes = draw_bars(bars, colors, "% of 120 words known")
    for color, label in ((GOOD, "embeddings train"), (PALE, "embeddings frozen")):
        axes.barh([0], [0], color=color, label=label)
    axes.legend(frameon=False, loc="upper right")
    return axes


def draw_bars(bars: Mapping[str, Sequence[float]], colors: Sequence[str], xlabel: str) -> Axes:
    """A bar a row: the mean, with its number, and a dot a seed."""
    _, axes = plt.subplots(figsize=WIDE, layout="constrained")
    means = [statistics.mean(seeds) for seeds in bars.values()]
    axes.barh(list(bars), means, color=colors, height=0.66)
    for row, (mean, seeds) in enumerate(zip(means, bars.values(), strict=True)):
        axes.scatter(seeds, [row] * len(seeds), color="white", edgecolor=INK, s=45, zorder=3)
        axes.text(max(seeds) + 1.5, row, f"{mean:.0f}", va="center", color=INK, weight="bold")
    axes.invert_yaxis()
    axes.set(xlabel=xlabel, xlim=(0, 108), xticks=range(0, 101, 20))
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def task_runs(method: str, rate: float | None = None) -> Sweep:
    """Runs of the task of the week, those of the table and those at other rates: full fine-tuning,
    or LoRA on all linear layers.
    """
    both = experiments.read("week") + experiments.read("lora_forgetting")
    settings = {} if rate is None else {"learning_rate": rate}
    if method == "LoRA":
        settings["layers"] = "all linear layers"
    return both.where(method, **settings)


def draw_forgetting() -> Axes:
    """Runs of the task of the week at three learning rates each: what they learned, and what they
    kept.
    """
    points = {}
    methods = {"full fine-tuning": "full fine-tuning", "LoRA r=8, all linear layers": "LoRA"}
    for name, runs in ((name, task_runs(method)) for name, method in methods.items()):
        losses, retained = values(runs, "response loss"), values(runs, "retention")
        points[name] = list(zip(losses, retained, strict=True))
    xlabel = "response loss on the task (nats): left is better"
    axes = widened(plots.plot_points(points, "", xlabel, "% retained"))
    axes.grid(color=PALE)
    return axes


def draw_blend(notebook: Notebook) -> Axes:
    shares = {}
    for row in table_rows(notebook, "for opening, close in ("):
        opening, close = row["weights"].split(" / ")
        counts = {"opens": row["opens"], "closes": row["closes"], "both": row["both"]}
        shares[f"opening {opening}\nclose {close}"] = {
            name: int(count) / int(row["of"]) for name, count in counts.items()
        }
    axes = widened(plots.plot_shares(shares, ""))
    axes.set(ylabel="% of replies")
    axes.tick_params(axis="x", labelsize=14.5)
    return axes


def draw_fusion(notebook: Notebook) -> Axes:
    """The first fused batch of the notebook: each job's row through the one base, and through its
    own adapter.
    """
    first = printed(notebook, "fusion.schedule(jobs").partition("budget 320:\n")[2].splitlines()[0]
    tokens = {job: int(count) for job, count in re.findall(r"'(\w+)': (\d+)", first)}
    axes = canvas(11, 4.6)
    for x, text in (
        (1.75, "one row a job, padded"),
        (5.35, "one product,\nall rows"),
        (7.75, "own A and B,\nown row"),
        (10.1, "own loss"),
    ):
        centred(axes, x, 4.2, text)
    box(axes, 5.35, 1.85, 1.5, 3.6, "W0", MASKED, size=24, weight="bold")
    ys = [3.25 - 0.93 * place for place in range(len(tokens))]
    for (job, count), y, color in zip(tokens.items(), ys, (GOOD, ACCENT, INK, MUTED), strict=True):
        full = 3.3
        own = full * count / max(tokens.values())
        padding = {"facecolor": "none", "edgecolor": PALE, "hatch": "///", "linewidth": 0}
        axes.add_patch(Rectangle((0.1, y - 0.28), full, 0.56, **padding))
        text = f"{job}: {count} tokens"
        box(axes, 0.1 + own / 2, y, own, 0.56, text, color, color="white", size=15)
        arrow(axes, (3.5, y), (4.58, y), color)
        arrow(axes, (6.12, y), (6.95, y), color)
        axes.text(6.5, y + 0.1, "+", ha="center", va="bottom", color=color, weight="bold")
        box(axes, 7.32, y, 0.22, 0.62, "", color)
        box(axes, 8.05, y, 0.9, 0.22, "", color)
        arrow(axes, (8.65, y), (9.55, y), color)
        box(axes, 10.1, y, 1.0, 0.5, "loss", TRAINED)
    return axes


# --- what the deck says beside its figures and tables


def stated(notebook: Notebook) -> Statements:
    w0, trained = found(
        notebook, "lora.LoRALinear(nn.Linear(200, 500)", r"W0 alone: ([\d,]+) weights; ([\d,]+) of"
    )
    (kilobytes,) = found(notebook, '"one adapter:"', r"one adapter: (\d+ kB)")
    count = 'for name, model, targets, rank in (("LLaMA-7B"'
    counted = {
        name: found(notebook, count, rf"{name}, .*: ([\d,]+) \+ ([\d,]+) =")
        for name in ("LLaMA-7B", "Falcon-7B")
    }
    (times,) = found(notebook, "GPT3_LAYERS, GPT3_WIDTH", r"350 GB / 36 MiB = ([\d,]+)")
    gpt3 = next(row for row in table_rows(notebook, "GPT3_LAYERS, GPT3_WIDTH") if row["r"] == "4")
    throughput, less = found(notebook, "43.1 / 32.5", r"throughput \+([\d.]+)%, time -([\d.]+)%")
    adapter, model = found(
        notebook, '"adapter on disk:', r"adapter on disk: ([\d.]+ MB); the model: (\d+ MB)"
    )
    *_, weights = result_rows(notebook)
    full, lora = (
        int(weights[column].replace(",", "")) for column in ("Day 1: all weights", "today: LoRA")
    )
    scaled = round(
        experiments.read("lora_scaling").where(rank=64, scale="8 / r").mean("exact match")
    )
    energy = round(directions("tiny")[8]["energy"])
    for fragment, claim in FOUND_TRUE.items():
        found(notebook, fragment, re.escape(claim))
    return {
        "A few directions": [
            f"Eight directions: {energy} % for tiny, {random_energy(8):.0f} % of a random matrix"
        ],
        "Freeze the matrix": [f"{trained} numbers instead of {w0}"],
        "Ours computes": [f"One adapter of tiny: {kilobytes}"],
        "Count before": [
            "| LLaMA-7B | q, v | 8 | {1} | {0} | 8 MiB |".format(*counted["LLaMA-7B"]),
            "| Falcon-7B | query_key_value | 32 | {1} | {0} | 18 MiB |".format(
                *counted["Falcon-7B"]
            ),
            "| GPT-3 | {GPT-3 175B} | 4 | 175 billion | {trained} | {file in fp16} |".format(
                **gpt3
            ),
            f"350 GB, {times} times",
        ],
        "Each rank has": [f"rank 64 reaches {scaled} % at 0.005"],
        "1.8 %": [f"{100 * lora / full:.1f} % of the weights learn the form"],
        "Merged": [f"On disk: {adapter} for the adapter, {model} for the model"],
        "Four sentences": [f"{throughput} % more throughput, {less} % less time"],
    }


def said(notebook: Notebook) -> Statements:
    best = {rank: round(runs.mean("exact match")) for rank, runs in best_rates().items()}
    too_fast = round(
        experiments.read("lora_rank_and_rate")
        .where(rank=64, learning_rate=5e-3)
        .mean("exact match")
    )
    full, lora = found(
        notebook, "before activations;", r"'full fine-tuning': '([\d.]+) GB', 'LoRA': '([\d.]+) GB'"
    )
    seconds = headline(notebook)["training"]["after"]
    apart, fused = found(
        notebook, "fusion.train_fused(together", r"one after the other ([\d.]+) s, fused ([\d.]+) s"
    )
    blends = {row["weights"]: row for row in table_rows(notebook, "for opening, close in (")}
    half, both = blends["0.5 / 0.5"], blends["1 / 1"]
    full_kept = [
        round(task_runs("full fine-tuning", rate).mean("retention")) for rate in (5e-5, 1e-4, 2e-4)
    ]
    lora_kept = [round(task_runs("LoRA", rate).mean("retention")) for rate in (1e-3, 2e-3, 5e-3)]
    words = values(experiments.read("lora_vocabulary").where("LoRA", rank=16))
    assert full_kept[0] == full_kept[1]
    assert (words.count(100), len(words)) == (2, 3), "every word in two of three seeds"
    return {
        "Each rank has": [
            f"all four lie between {min(best.values())} and {max(best.values())}",
            f"it falls apart, {too_fast} percent",
        ],
        "1.8 %": [
            f"take {lora} gigabytes instead of {full}",
            f"the run took {seconds} seconds",
        ],
        "The table of the week": [f"keeps less, {lora_kept[1]} percent against {full_kept[1]}"],
        "Does LoRA forget less?": [
            "keeps {1} percent at the two lower rates, and {2} at the highest".format(*full_kept),
            "LoRA: {}, {}, {}".format(*lora_kept),
        ],
        "How large": [f"rank one reaches {best[1]} percent and rank sixteen {best[16]}"],
        "New words": ["knows every word in two of three seeds"],
        "Adapters mix": [
            "the close survives in {closes} of {of} replies, the opening in {opens}".format(**half),
            "both ornaments in {both} of {of}".format(**both),
        ],
        "Four jobs": [f"{apart} seconds one after the other, {fused} fused"],
    }
