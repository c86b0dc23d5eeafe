"""From instruction records to batches: token ids, and labels that train on the answer only.

    ids     prompt ... prompt  answer ... answer  EOS
    labels   -100  ...  -100   answer ... answer  EOS        (-100 is what cross_entropy ignores)

Three departures from the common recipes, each against a silent failure:
- Prompt and answer are tokenized apart, as they are when the model generates. Tokenized together,
  the colon of `### Response:` can merge with a quote or a dash that opens the answer, and the model
  would train on a boundary that it never meets.
- EOS is appended here and padding is masked by position. SmolLM2 pads with EOS, so masking by token
  id would mask the EOS too, and the model would never learn to stop.
- The text of a record is encoded with split_special_tokens=True, so that "<|im_end|>" in the data
  is ten characters of text and not a control token. add_special_tokens=False does not do that.

A padded batch computes on filler. Examples of similar length together need less of it
(`length_grouped_order`); several examples in one row need almost none (`pack`), but then each must
see itself only and count its positions from 0 (`collate_packed`).
"""

import html
import inspect
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from course_lib.alpaca import Record
from course_lib.runtime import CourseError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One record as tokens; both lists have the same length."""

    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def supervised_ids(self) -> list[int]:
        return [label for label in self.labels if label != IGNORED]


@dataclass(frozen=True)
class Encoding:
    """The examples that fit, and one line for each record that was refused: read = examples +
    refused.
    """

    examples: list[Example]
    refused: list[str]

    def __str__(self) -> str:
        return (
            f"{len(self.examples) + len(self.refused)} records = {len(self.examples)} encoded + "
            f"{len(self.refused)} too long"
        )


def encode_text(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids of plain text, which cannot forge special tokens.

    >>> from course_lib import models, runtime
    >>> tokenizer = models.load("tiny", runtime.detect()).tokenizer
    >>> tokenizer.eos_token_id in encode_text("<|endoftext|>", tokenizer)
    False
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        found = "half of a surrogate pair"
        raise CourseError(f"the text holds {found}, which no tokenizer reads: take it out")
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_prompt(record: Record, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids the model answers to, after what the tokenizer puts before a text."""
    return beginning(tokenizer) + encode_text(record.prompt, tokenizer)


def beginning(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The special tokens that the tokenizer puts before a text: Llama 2's BOS, SmolLM2's none.

    What it appends, as some do EOS, is not among them: after it a model has nothing to say.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    places = range(len(whole) - len(plain) + 1)
    return whole[: next(i for i in places if whole[i : i + len(plain)] == plain)]


def encode(
    record: Record,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    mask_prompt: bool = True,
) -> Example:
    """Prompt, answer, EOS.

    mask_prompt: False trains on the prompt too, for the comparison of Day 1

    >>> from course_lib import models, runtime
    >>> tokenizer = models.load("tiny", runtime.detect()).tokenizer
    >>> example = encode(Record("Add.", "2", input="1 + 1"), tokenizer)
    >>> tokenizer.decode(example.supervised_ids)
    '2<|endoftext|>'
    """
    return with_answer(
        encode_prompt(record, tokenizer), record.output, tokenizer, mask_prompt=mask_prompt
    )


def with_answer(
    prompt_ids: list[int],
    answer: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    mask_prompt: bool = True,
) -> Example:
    """These ids, the answer, EOS; mask_prompt: as for `encode`."""
    if tokenizer.eos_token_id is None:
        advice = "set tokenizer.eos_token to the token that ends a text"
        raise CourseError(f"the tokenizer has no EOS, so no answer could end: {advice}")
    answer_ids = [*encode_text(answer, tokenizer), tokenizer.eos_token_id]
    prompt_labels = [IGNORED] * len(prompt_ids) if mask_prompt else prompt_ids
    return Example(prompt_ids + answer_ids, prompt_labels + answer_ids)


def encode_records(
    records: Sequence[Record],
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int,
    *,
    mask_prompt: bool = True,
) -> Encoding:
    """Encode all records; one longer than max_tokens is refused, because a cut answer would teach
    to stop in mid-sentence.

    Raises CourseError if none fits.
    """
    examples, refused = [], []
    if not isinstance(records, Sequence):
        found = f"records is a {type(records).__name__}"
        raise CourseError(f"{found}, expected a list of records, such as read_records(...).records")
    for number, record in enumerate(records, start=1):
        example = encode(record, tokenizer, mask_prompt=mask_prompt)
        if len(example) <= max_tokens:
            examples.append(example)
        else:
            refused.append(
                f"record {number}: {len(example)} tokens, at most {max_tokens}: raise max_tokens "
                "or shorten it"
            )
    if not examples:
        raise CourseError(
            f"none of {len(records)} records fits into {max_tokens} "
            f"tokens{f' ({refused[0]})' if refused else ''}"
        )
    return Encoding(examples, refused)


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Pad on the right to the longest example: input_ids, attention_mask and labels, each (N, T)
    int64.
    """
    longest = max(map(len, examples))

    def padded(rows: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])

    return {
        "input_ids": padded([example.input_ids for example in examples], pad_id),
        "attention_mask": padded([[1] * len(example) for example in examples], 0),
        "labels": padded([example.labels for example in examples], IGNORED),
    }


def check_ids(
    ids: Iterable[int], model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None" = None
) -> None:
    """Raise CourseError if the model has no embedding for one of these token ids, or for what the
    tokenizer pads with: they are of another model's tokenizer, or were added to it alone.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    pad_id = None if tokenizer is None else tokenizer.pad_token_id
    if pad_id is not None and not 0 <= pad_id < rows:
        advice = "model.resize_token_embeddings(len(tokenizer)) adds rows, or pad with EOS"
        raise CourseError(
            f"the tokenizer pads with token id {pad_id}, beyond the model's {rows} embeddings: "
            f"{advice}"
        )
    out = next((token for token in ids if not 0 <= token < rows), None)
    if out is not None:
        advice = "encode with the model's own tokenizer, or add new tokens with add_pieces"
        raise CourseError(f"token id {out} is beyond the model's {rows} embeddings: {advice}")


def most_positions(model: "PreTrainedModel | PreTrainedConfig") -> float:
    """How many tokens of text the model can read at once, behind its virtual tokens if it has some;
    infinite where its config names no limit.
    """
    config = getattr(model, "config", model).get_text_config()
    names = ("max_position_embeddings", "max_seq_len")
    limits = (getattr(config, name, None) for name in names)
    limit = next((limit for limit in limits if isinstance(limit, int) and limit > 0), math.inf)
    return limit - getattr(getattr(model, "virtual_tokens", None), "count", 0)


def check_examples(
    examples: Sequence[Example], model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Raise CourseError for examples that `model` cannot be trained on: none, empty, too long, or
    of another tokenizer.
    """
    if not isinstance(examples, Sequence):
        raise CourseError(
            f"examples is a {type(examples).__name__}, expected a list: "
            "encode_records(...).examples"
        )
    if not examples:
        raise CourseError("there are no examples to train on")
    longest = most_positions(model)
    for number, example in enumerate(examples, start=1):
        if not isinstance(example, Example):
            found = f"example {number} is a {type(example).__name__}"
            raise CourseError(f"{found}: encode it first, with encode_records(...).examples")
        if len(example.input_ids) != len(example.labels):
            raise CourseError(
                f"example {number} has {len(example.input_ids)} ids and {len(example.labels)} "
                "labels"
            )
        if not example.supervised_ids:
            raise CourseError(f"example {number} has no supervised token: every label is {IGNORED}")
        if len(example) > longest:
            raise CourseError(
                f"example {number} has {len(example)} tokens, the model takes {longest}: encode "
                "with max_tokens"
            )
        check_ids((*example.input_ids, *example.supervised_ids), model, tokenizer)


def real_token_share(lengths: Sequence[int], batch_size: int) -> float:
    """The share of a padded epoch that is not padding, in the given order.

    >>> real_token_share([2, 4, 2, 4], batch_size=2), real_token_share([2, 2, 4, 4], batch_size=2)
    (0.75, 1.0)
    """
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def length_grouped_order(lengths: Sequence[int], batch_size: int, seed: int) -> list[int]:
    """Indices in a random order in which each slice of `batch_size` has similar lengths;
    transformers' own grouping.
    """
    from transformers.trainer_pt_utils import get_length_grouped_indices

    return get_length_grouped_indices(
        list(lengths), batch_size, generator=torch.Generator().manual_seed(seed)
    )


def training_order(
    lengths: Sequence[int], steps: int, examples_per_step: int, group_by_length: bool, seed: int
) -> list[int]:
    """The index of every example that a run sees, in order: shuffled epochs, one after the other,
    up to the last step.

    Fixed before the run starts, so that a resumed run goes on with the examples that the broken one
    had not seen.

    >>> training_order([5, 5, 5], steps=2, examples_per_step=2, group_by_length=False, seed=0)
    [1, 2, 0, 0]
    """
    order: list[int] = []
    while len(order) < steps * examples_per_step:
        epoch_seed = seed * 10_007 + len(order)
        if group_by_length:
            order += length_grouped_order(lengths, examples_per_step, epoch_seed)
        else:
            order += random.Random(epoch_seed).sample(range(len(lengths)), len(lengths))
    return order[: steps * examples_per_step]


def pack(examples: Sequence[Example], max_tokens: int) -> list[list[Example]]:
    """Put examples into rows of at most max_tokens: the longest first, each into the first row with
    room (first-fit decreasing).

    Needs at most 11/9 of the fewest possible rows, and less than one more (Dósa 2007).
    Raises CourseError for an example that is longer than a row.

    >>> rows = pack([Example([5] * n, [5] * n) for n in (3, 6, 4, 5, 2)], max_tokens=10)
    >>> [[len(example) for example in row] for row in rows]
    [[6, 4], [5, 3, 2]]
    """
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=len, reverse=True):
        if len(example) > max_tokens:
            raise CourseError(
                f"an example has {len(example)} tokens, a row takes {max_tokens}: raise "
                "max_tokens, or leave it out"
            )
        place = next((index for index, free in enumerate(room) if len(example) <= free), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(max_tokens)
        rows[place].append(example)
        room[place] -= len(example)
    return rows


def collate_packed(
    rows: Sequence[Sequence[Example]], pad_id: int, model: "PreTrainedModel"
) -> dict[str, Tensor]:
    """Packed rows as a batch for `model` in which no example sees another.

    Returns input_ids, labels and position_ids, each (N, T) int64, and attention_mask (N, 1, T, T),
    which is added to the attention scores: 0 where a position sees another, the lowest number where
    not. Positions count from 0 in each example. Its first label is -100: the position before it
    belongs to another example. A padding position sees itself only.

    Raises CourseError for a model that would compute something else than on the padded rows.
    """
    _check_packable(model, max(len(example) for row in rows for example in row))
    dtype = model.get_input_embeddings().weight.dtype
    longest = max(sum(map(len, row)) for row in rows)
    shape = (len(rows), longest)
    input_ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORED)
    # owner 0: padding
    position_ids, owner = (
        torch.zeros(shape, dtype=torch.int64),
        torch.zeros(shape, dtype=torch.int64),
    )
    for index, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, start=1):
            place = slice(start, start + len(example))
            input_ids[index, place] = torch.tensor(example.input_ids)
            labels[index, place] = torch.tensor([IGNORED, *example.labels[1:]])
            position_ids[index, place] = torch.arange(len(example))
            owner[index, place] = number
            start += len(example)
    same = (owner[:, :, None] == owner[:, None, :]) & (owner > 0)[:, None, :]  # (N, T, T)
    sees = (same & torch.ones(longest, longest, dtype=torch.bool).tril()) | torch.eye(
        longest, dtype=torch.bool
    )
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "attention_mask": mask[:, None],
    }


def _check_packable(model: "PreTrainedModel", longest: int) -> None:
    """Raise CourseError if the model mixes examples that share a row, whatever the mask says, or if
    examples of up to `longest` tokens would see more in a packed row than they do alone.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    windows = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    reach = getattr(config, windows["sliding_attention"], None)
    if getattr(config, "use_sliding_window", None) is False:
        reach = None
    if kinds:
        spans = [getattr(config, name, None) for kind, name in windows.items() if kind in kinds]
        reach = min(filter(None, spans), default=None)
    found = ""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        found = "takes no positions"
    elif config.model_type in ("openai-gpt", "xlm", "xlnet", "reformer"):
        found = "takes no mask of its own for each position"
    elif any(
        "position" in name and getattr(module, "padding_idx", None) is not None
        for name, module in model.named_modules()
    ):
        found = "counts positions from its padding token on"
    elif getattr(config, "alibi", False):
        found = "counts positions by the row (ALiBi)"
    elif others := kinds - {"full_attention", *windows}:
        found = f"has layers of another kind than attention ({min(others)})"
    elif reach is not None and longest > reach:
        found = f"sees {reach} tokens back, and an example has {longest}"
    if found:
        advice = "pad its batches instead, with collate"
        raise CourseError(f"a {type(model).__name__} {found}, so it cannot be packed: {advice}")


class MaskView:
    """An example for eyes: trained tokens green, masked ones grey; in a terminal trained tokens
    stand in [brackets].
    """

    def __init__(self, pieces: list[tuple[str, bool]]):
        self.pieces = pieces

    def __repr__(self) -> str:
        return "".join(f"[{piece}]" if trained else piece for piece, trained in self.pieces)

    def _repr_html_(self) -> str:
        spans = []
        for piece, trained in self.pieces:
            style = (
                "background:#b7e4c7;color:#081c15;font-weight:600"
                if trained
                else "background:#eeeeee;color:#6c757d"
            )
            visible = html.escape(piece).replace("\n", "&#x21B5;<br>").replace(" ", "&nbsp;")
            spans.append(
                f'<span style="{style};border:1px solid #ffffff;border-radius:3px">{visible}</span>'
            )
        return f'<div style="font-family:monospace;line-height:1.7">{"".join(spans)}</div>'


def show_mask(example: Example, tokenizer: "PreTrainedTokenizerBase") -> MaskView:
    """Colour an example's tokens by whether they are trained.

    >>> from course_lib import models, runtime
    >>> tokenizer = models.load("tiny", runtime.detect()).tokenizer
    >>> show_mask(encode(Record("Add.", "a fox"), tokenizer), tokenizer).pieces[-4:]
    [(':', False), (' a', True), (' fox', True), ('<|endoftext|>', True)]
    """
    pieces, before = [], ""
    # alone, a word would lose its space in tokenizers that add one
    for end, label in enumerate(example.labels, start=1):
        text = tokenizer.decode(example.input_ids[:end], clean_up_tokenization_spaces=False)
        # a character of several tokens is shown with its last one
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}")
        if whole or end == len(example):
            pieces.append((text[len(before) :], label != IGNORED))
            before = text
    return MaskView(pieces)
