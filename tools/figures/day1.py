"""The figures of Day 1, and its part of the table of the week."""

import html
import re
import textwrap
from collections.abc import Callable

from matplotlib.axes import Axes

from course_lib import experiments, explorables, memory, plots
from course_lib.alpaca import Record
from course_lib.plots import ACCENT, GOOD, INK, MASKED, MUTED, PALE, TRAINED, box, canvas, centred
from tools.figures.drawing import (
    Notebook,
    Row,
    Statements,
    arrow,
    found,
    headline,
    picture,
    shown,
    table_rows,
    week_rows,
    widened,
)

NAME = "day1_alpaca"
LLAMA_65B = 65_285_660_672
ALPACA_RECORDS, ALPACA_BATCH, ALPACA_EPOCHS = 52_002, 128, 3
MONO = "DejaVu Sans Mono"
Piece = tuple[str, bool]  # the text of a token, and whether it is trained


def figures(notebook: Notebook) -> dict[str, Callable[[], Axes | bytes]]:
    """What draws each figure of the day.

    Two whose numbers the notebook does not print are its own pictures, as they are.
    """
    pieces = mask_pieces(notebook)
    return {
        "next_tokens": lambda: picture(notebook, "plots.plot_next_tokens("),
        "loss": lambda: picture(notebook, "plots.plot_loss("),
        "history": draw_history,
        "self_instruct": draw_self_instruct,
        "mask": lambda: draw_mask(pieces),
        "shift": lambda: draw_shift(pieces),
        "padding": lambda: draw_padding(notebook),
        "loss_of_an_example": lambda: explorables.page(
            shown(notebook, "explorables.loss_of_an_example(", "text/html")
        ),
        "bills": draw_bills,
        "before_after": lambda: draw_before_after(notebook),
        "topics": lambda: draw_topics(notebook),
    }


def tables(notebook: Notebook) -> list[list[Row]]:
    """The tables of the deck that are measured."""
    weeks = week_rows(
        experiments.read("week").where(
            "untouched", "ten examples in the prompt", "full fine-tuning"
        )
    )
    return [weeks, changed_rows(notebook)]


def changed_rows(notebook: Notebook) -> list[Row]:
    """Plain questions that the notebook shows as lost and as gained, two of each."""
    rows = table_rows(notebook, "lost = [")
    chosen = [row for what in ("lost", "gained") for row in [r for r in rows if r[""] == what][:2]]
    return [
        {"plain question": row["question"], "answer": row["answer"]}
        | {"reply now": textwrap.shorten(row["now"], 30, placeholder=" …"), "": row[""]}
        for row in chosen
    ]


def mask_pieces(notebook: Notebook) -> list[Piece]:
    """The tokens of the example that the notebook shows with show_mask."""
    spans = re.findall(
        r'<span style="background:(#\w+)[^"]*">(.*?)</span>',
        shown(notebook, "batching.show_mask(", "text/html"),
    )
    texts = (
        html.unescape(text.replace("<br>", "\n")).replace("\N{NO-BREAK SPACE}", " ")
        for _, text in spans
    )
    return [(text, color == TRAINED) for text, (color, _) in zip(texts, spans, strict=True)]


def draw_before_after(notebook: Notebook) -> Axes:
    results = headline(notebook)
    names = ("valid JSON", "right topic", "right answer", "plain questions")
    labels = {name: f"{name}\n(of {results[name]['questions']})" for name in names}
    shares = {
        label: {when: results[name][when] / 100 for when in ("before", "after")}
        for name, label in labels.items()
    }
    return widened(plots.plot_shares(shares, ""))


def draw_topics(notebook: Notebook) -> Axes:
    """Right answers by topic; to the left the topics none of whose answers occurs in training."""
    rows = [
        row for row in table_rows(notebook, 'rows.append({"topic": "all"}') if row["topic"] != "all"
    ]
    rows.sort(key=lambda row: int(row["seen"]) > 0)
    unseen = sum(row["seen"] == "0" for row in rows)
    shares = {
        row["topic"]: {
            "before, anywhere in a free reply": int(row["before, free form"]) / int(row["of"]),
            "after, as JSON": int(row["after"]) / int(row["of"]),
        }
        for row in rows
    }
    axes = widened(plots.plot_shares(shares, ""))
    axes.axvline(unseen - 0.5, color=INK, linestyle=":", linewidth=1.5)
    above = {"ha": "center", "color": INK}
    axes.text((unseen - 1) / 2, 104, "no answer occurs in training", **above)
    axes.text((unseen + len(rows) - 1) / 2, 104, "answers of other questions recur", **above)
    axes.set(ylabel="% right", ylim=(0, 116), yticks=range(0, 101, 20))
    axes.tick_params(axis="x", labelsize=14.5)
    return axes


def draw_bills() -> Axes:
    bills = {
        name: {
            part: size * LLAMA_65B / 1e9
            for part, size in {
                "weights": bill.weights,
                "gradients": bill.gradients,
                "Adam moments": bill.moments,
                "other": bill.other,
            }.items()
        }
        for name, bill in memory.BILLS.items()
    }
    axes = plots.plot_bills(bills, "")
    for label, bill in zip(axes.texts, memory.BILLS.values(), strict=True):
        label.set_text(f" {round(LLAMA_65B * bill.bytes_per_parameter / 1e9)}")
    axes.set_yticks(
        range(len(bills)),
        [f"{name}: {bill.bytes_per_parameter} bytes" for name, bill in memory.BILLS.items()],
    )
    axes.set_xlabel("GB to train 65 billion weights")
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.35, -0.2))
    return widened(axes)


def draw_history() -> Axes:
    """What three kinds of models look at to predict the token after "The color of the sky is"."""
    axes = canvas(11, 4.8)
    words = "The color of the sky is".split()
    places = [3.75 + 1.1 * index for index in range(len(words))]
    target = 10.4
    rows = (
        ("n-gram", "a table over\nthe last words", 3.85),
        ("recurrent net", "one state,\npassed along", 2.2),
        ("attention", "every token,\nweighted", 0.55),
    )
    for name, about, y in rows:
        axes.text(0.05, y + 0.42, name, color=INK, weight="bold", size=19, va="center")
        axes.text(0.05, y - 0.12, about, color=INK, va="center", linespacing=1.25)
        seen = places[-2:] if name == "n-gram" else places
        for word, x in zip(words, places, strict=True):
            style = {} if x in seen else {"color": "#8d99a6"}
            box(axes, x, y, 0.95, 0.5, word, TRAINED if x in seen else MASKED, **style)
        box(axes, target, y, 0.6, 0.5, "?", ACCENT, color="white", weight="bold")
        if name == "recurrent net":
            for left, right in zip(places, [*places[1:], target], strict=True):
                start, end = (left + 0.48, y), (right - (0.3 if right == target else 0.48), y)
                arrow(axes, start, end, GOOD)
        else:
            for x in seen:
                start, end, bend = (x, y + 0.26), (target - 0.1, y + 0.26), (target - x) ** -0.62
                arrow(axes, start, end, GOOD, bend=-0.5 * bend)
    return axes


def draw_self_instruct() -> Axes:
    axes = canvas(11, 4.5)
    box(axes, 1.3, 3.4, 2.3, 1.1, "175 seed tasks,\nby people", TRAINED)
    box(axes, 4.5, 3.4, 2.2, 1.1, "pool of tasks", PALE)
    box(axes, 8.9, 3.4, 3.6, 1.1, "a large model writes\nnew tasks and answers", TRAINED)
    box(axes, 6.7, 1.1, 4.0, 1.1, "keep what is new:\nROUGE-L below 0.7 to all", PALE)
    white = {"color": "white", "weight": "bold"}
    box(axes, 1.75, 1.1, 3.2, 1.1, "fine-tune\nthe small model", ACCENT, **white)
    arrow(axes, (2.45, 3.4), (3.38, 3.4))
    arrow(axes, (5.62, 3.4), (7.08, 3.4))
    axes.text(6.33, 3.62, "examples", ha="center", va="bottom", color=INK)
    arrow(axes, (8.2, 2.83), (7.6, 1.67))
    arrow(axes, (5.8, 1.67), (4.85, 2.83))
    arrow(axes, (3.95, 2.83), (2.75, 1.67))
    return axes


def draw_mask(pieces: list[Piece], columns: int = 74) -> Axes:
    """The example as the notebook shows it: trained tokens green, the others grey."""
    lines: list[list[Piece]] = [[]]
    for text, trained in pieces:
        if sum(len(piece) for piece, _ in lines[-1]) + len(text.rstrip("\n")) > columns:
            lines.append([])
        lines[-1].append((text.rstrip("\n"), trained))
        if text.endswith("\n"):
            lines.append([])
    advance, step = 10.9 / columns, 0.56
    axes = canvas(11, step * len(lines) + 0.1)
    size = advance * 72 / 0.602  # DejaVu Sans Mono is 0.602 em wide
    for row, line in enumerate(lines):
        x, y = 0.05, step * (len(lines) - row - 0.5) + 0.05
        for text, trained in line:
            width = advance * len(text)
            face, color = (TRAINED, "#081c15") if trained else (MASKED, MUTED)
            style = {"family": MONO, "size": size, "color": color}
            box(axes, x + width / 2, y, width - 0.03, 0.44, text, face, **style)
            x += width
    return axes


def draw_shift(pieces: list[Piece]) -> Axes:
    """The end of the prompt, the begin and the end of the answer: what is read, and what is asked
    for at that place.
    """
    first = next(index for index, (_, trained) in enumerate(pieces) if trained)
    middle, last = range(first - 2, first + 3), range(len(pieces) - 3, len(pieces))
    columns = [*middle, None, *last]
    axes = canvas(11, 3.4)
    xs = [2.1 + 1.045 * place for place in range(len(columns))]
    axes.text(0.05, 2.75, "reads", color=INK, weight="bold", va="center")
    axes.text(0.05, 0.95, "predicts", color=INK, weight="bold", va="center")
    for x, index in zip(xs, columns, strict=True):
        if index is None:
            centred(axes, x, 2.75, "…")
            centred(axes, x, 0.95, "…")
            continue
        token_box(axes, x, 2.75, pieces[index])
        if index + 1 == len(pieces):
            centred(axes, x, 0.95, "(the end)", color=MUTED, size=14)
            continue
        token_box(axes, x, 0.95, pieces[index + 1])
        verdict, color = ("counts", GOOD) if pieces[index + 1][1] else ("ignored", MUTED)
        arrow(axes, (x, 2.4), (x, 1.3), color)
        centred(axes, x, 0.35, verdict, size=15, color=color)
    return axes


def draw_padding(notebook: Notebook) -> Axes:
    """A row that is padded with EOS, masked in the two ways, and how many EOS labels the notebook
    counts in its two rows.
    """
    counts = found(
        notebook, "by_id = ", r"EOS labels, masked by position: (\d+) +masked by token id: (\d+)"
    )
    axes = canvas(11, 4.2)
    for x, text in ((4.35, "the row's own tokens"), (7.65, "padding")):
        centred(axes, x, 3.9, text)
    for left, way, y in zip(counts, ("position", "token id"), (2.75, 1.0), strict=True):
        kept = int(left) > 0
        axes.text(0.05, y + 0.22, "masked by", color=INK, va="center")
        axes.text(0.05, y - 0.22, way, color=INK, weight="bold", va="center")
        pieces = [("prompt", False), ("answer", True), ("EOS", kept), *[("EOS", False)] * 3]
        for (text, trained), x in zip(pieces, (2.85, 4.35, 5.6, 6.65, 7.65, 8.65), strict=True):
            width = 1.4 if x < 5 else 0.94
            face, color = (TRAINED, INK) if trained else (MASKED, MUTED)
            box(axes, x, y, width, 0.7, text, face, color=color)
        style = {"color": GOOD if kept else ACCENT, "weight": "bold", "va": "center"}
        axes.text(9.35, y + 0.22, f"{left} EOS labels", **style)
        axes.text(9.35, y - 0.22, "in two rows", color=INK, va="center")
    centred(axes, 5.6, 0.3, "never trained", color=ACCENT)
    return axes


def token_box(axes: Axes, x: float, y: float, piece: Piece) -> None:
    text, trained = piece
    text = "EOS" if text.startswith("<|") else text.strip()
    face = TRAINED if trained else MASKED
    box(axes, x, y, 0.99, 0.62, text, face, family=MONO, size=14)


# --- what the deck says beside its figures and tables


def stated(notebook: Notebook) -> Statements:
    """What the slides say with the notebook's own numbers."""
    pieces = mask_pieces(notebook)
    (vocabulary,) = found(notebook, "next_tokens(", r"likeliest of ([\d,]+) tokens")
    (perplexity,) = found(notebook, "torch.autograd.grad(ours", r"exp\(loss\): (\d+)")
    before, after = found(
        notebook, "topics with no answer seen", r"right before (\d+), after (\d+)"
    )
    (unseen,) = found(notebook, "topics with no answer seen", r"training: (\d+) questions")
    lost, known, gained, unknown = found(
        notebook,
        "lost = [",
        r"lost (\d+) of (\d+), gained (\d+) of (\d+)",
    )
    (steps,) = found(notebook, "my_finetune(base, train", r"step +(\d+): [^\n]*\n\d+ s, peak")
    (train,) = found(notebook, "things, wordings", r"train +(\d+) questions")
    (test,) = found(notebook, "things, wordings", r"test +(\d+) questions")
    prompted = experiments.read("week").where("ten examples in the prompt")
    json, topic, answer = (
        [round(run.scores[measure]) for run in prompted.outcomes]
        for measure in ("valid JSON", "right topic", "right answer")
    )
    template = Record("Give the capital of this country.", "Copenhagen", input="Denmark").prompt
    alpacas_steps = round(ALPACA_EPOCHS * ALPACA_RECORDS / ALPACA_BATCH)
    return {
        "A plain base, before": opening_rows(notebook),
        "A model is a distribution": [f"each of {vocabulary} tokens"],
        "A template turns": [template],
        "The same recipe at two sizes": [
            f"| optimizer steps | about {alpacas_steps:,} | {steps} |"
        ],
        "Only the answer": [f"{sum(trained for _, trained in pieces)} of {len(pieces)} tokens"],
        "The loss: mean": [f"among {perplexity} tokens"],
        "Ten examples in the prompt": [
            f"Valid JSON: {min(json)} to {max(json)} %",
            f"right topic: {min(topic)} to {max(topic)} %",
            f"right answer: {min(answer)} to {max(answer)} %",
        ],
        "Three details": details(notebook),
        "The task of the week": [f"{train} questions to train, {test} to validate, {test} to test"],
        "The loss falls": [f"{steps} steps of 4"],
        "Answers that stand in no": [f"rose from {before} to {after} of {unseen}"],
        "What was lost": [
            f"{lost} of {known} lost, {gained} of {unknown} gained",
            f"{int(known) - int(lost) + int(gained)} right of {int(known) + int(unknown)}",
            f"Untouched: {known}, and in other words {min(reworded())} to {max(reworded())}",
        ],
    }


def opening_rows(notebook: Notebook) -> list[str]:
    """Three questions of the opening with their replies, and how many of all were right."""
    rows = {row["question"].strip(): row for row in table_rows(notebook, "tiny_before = ")}
    (unseen,) = found(
        notebook, "third_of_kinds(third)]", r"after *: of 180 replies (\d+) are the answer"
    )
    chosen = ("Write the plural of the word. hammer", "Translate the word into Velan. hat")
    exact = [
        found(
            notebook, "tiny_before = ", rf"{when} *: of (\d+) replies [^\n]* (\d+) also end there"
        )
        for when in ("before", "after")
    ]
    return [
        *(
            "| {} | {} | {} |".format(asked, row["before"].replace("\n", " ↵ "), row["after"])
            for asked, row in rows.items()
            if asked in chosen
        ),
        f"Of {exact[0][0]} replies, {exact[0][1]} were the right answer",
        f"after 90 steps {exact[1][1]} are",
        f"instruction that were never trained: {unseen} of 180",
    ]


def reworded() -> list[int]:
    """How many of all plain questions the untouched model answers, put in other words."""
    sweep = experiments.read("plain_questions")
    asked = {name: sweep.measures[name].questions for name in ("retention", "gained")}
    return [
        round(sum(run.scores[name] * number / 100 for name, number in asked.items()))
        for run in sweep.outcomes[1:]  # the first is as they are
    ]


def details(notebook: Notebook) -> list[str]:
    """The rows of the slide on what happens if a detail is left out."""
    right = found(
        notebook, "newline = ", r"right_answer +as trained +(\d+) %, with a newline +(\d+) %"
    )
    ends = found(
        notebook, "masked = [", r"EOS trained: [^\n]* (\d+) end there(?s:.*) (\d+) end there"
    )
    (asked,) = found(notebook, "masked = [", r"EOS masked: [^\n]*of (\d+) replies")
    masking = experiments.read("tiny_prompt_masking")
    best = [
        max(masking.where(loss_on=tokens, learning_rate=rate).mean("exact match") for rate in rates)
        for tokens in ("answer only", "all tokens")
        for rates in [sorted({run.settings["learning rate"] for run in masking.outcomes})]
    ]
    return [
        f"| {right[0]} % right | {right[1]} % |",
        f"| {ends[0]} of {asked} replies end after the right answer | {ends[1]} |",
        f"| {best[0]:.0f} % exact match | {best[1]:.0f} % |",
    ]


def said(notebook: Notebook) -> Statements:
    """What the notes say with them."""
    result = {
        name: tuple(round(of[when]) for when in ("before", "after"))
        for name, of in headline(notebook).items()
    }
    statements = [
        "from {} to {} percent: that is the new behaviour".format(*result["valid JSON"]),
        f"right topic follows, {result['right topic'][1]} percent",
        "rises from {} to {} percent".format(*result["right answer"]),
        "of the plain questions {} and {} percent".format(*result["plain questions"]),
    ]
    return {"The form: from never to nearly always": statements}
