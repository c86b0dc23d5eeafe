"""New pieces for a tokenizer, and new rows for the model's embeddings: how an English model is
prepared for Chinese.

Source: Chinese-LLaMA (Cui et al. 2023, arXiv 2304.08177). 20,000 pieces learned by SentencePiece
from Chinese text turned LLaMA's 32,000 into 49,953; then the model was trained on Chinese text.
Ours are learned by byte-pair encoding from a few pages, which is enough to see tokens per character
fall. A new row starts at the mean of the rows that it replaces, not at random: at first the model
reads the new piece as a blur of the old ones.
"""

import copy
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from course_lib.batching import encode_text
from course_lib.runtime import CourseError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from course_lib.models import Loaded

HAN = re.compile(r"[\u4e00-\u9fff]+")  # a run of Chinese characters, without punctuation
# where byte-pair encoding would stop; a few pages end long before, with pairs that occur twice
MOST_PIECES = 100_000


def tokens_per_character(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> float:
    """Tokens divided by characters, over all texts: about 0.2 for English, above 1 for Chinese in a
    tokenizer made for English.
    """
    return sum(len(encode_text(text, tokenizer)) for text in texts) / sum(map(len, texts))


def learn_pieces(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", count: int
) -> list[str]:
    """The `count` Chinese pieces that save the most tokens in `texts`: byte-pair encoding over
    characters, best first.

    A piece that occurs n times and that `tokenizer` writes with k tokens saves n (k - 1) of them.
    Raises CourseError if the texts do not hold so many.
    """
    from tokenizers import Tokenizer, models, trainers

    runs = [run for text in texts for run in HAN.findall(text)]
    learner = Tokenizer(models.BPE())
    learner.train_from_iterator(
        runs, trainers.BpeTrainer(vocab_size=MOST_PIECES, min_frequency=2, show_progress=False)
    )
    uses = Counter(piece for run in runs for piece in learner.encode(run).tokens)
    saved = {piece: n * (len(encode_text(piece, tokenizer)) - 1) for piece, n in uses.items()}
    pieces = sorted(
        (piece for piece in saved if saved[piece] > 0), key=lambda piece: (-saved[piece], piece)
    )
    if len(pieces) < count:
        raise CourseError(
            f"these texts give {len(pieces)} new pieces, {count} were asked for: ask for fewer, or "
            "give more text"
        )
    return pieces[:count]


def extended_copy(
    tokenizer: "PreTrainedTokenizerBase", pieces: Sequence[str]
) -> "PreTrainedTokenizerBase":
    """A tokenizer with these pieces, whose ids follow the old ones; the given one stays as it is.

    Of several pieces that fit at one place the longest is taken, before the tokenizer's own rules
    apply. A tokenizer that puts a space before a text (tiny's, Llama 2's) puts one after such a
    piece, too; SmolLM2's does not.
    """
    from tokenizers import AddedToken

    extended = copy.deepcopy(tokenizer)
    extended.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    return extended


def add_pieces(base: "Loaded", pieces: Sequence[str]) -> None:
    """Give `base` a tokenizer with these pieces, and a row for each: the mean of the rows of the
    tokens it replaces.

    Raises CourseError, before anything is changed, for a piece that stands twice, is one token
    already, or is nothing.
    """
    replaced = [encode_text(piece, base.tokenizer) for piece in pieces]
    if twice := [piece for piece, count in Counter(pieces).items() if count > 1]:
        raise CourseError(f"{twice[0]!r} stands twice among the pieces: give each once")
    if whole := [piece for piece, ids in zip(pieces, replaced, strict=True) if len(ids) < 2]:
        raise CourseError(f"{whole[0]!r} is one token already: add pieces of two or more tokens")
    first, extended = len(base.tokenizer), extended_copy(base.tokenizer, pieces)
    if (added := len(extended) - first) < len(pieces):
        raise CourseError(f"the tokenizer takes {added} of {len(pieces)} pieces: give other ones")
    base.tokenizer = extended
    # some models have spare rows
    rows = max(base.model.get_input_embeddings().weight.shape[0], len(base.tokenizer))
    base.model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for weight in _token_matrices(base.model):
            for row, ids in enumerate(replaced, start=first):
                weight[row] = weight[ids].mean(0)


@contextmanager
def only_new_rows(model: "PreTrainedModel", first: int) -> Iterator[None]:
    """In the block only the rows from `first` on of the embeddings train, and of the output head if
    it has its own.

    The matrix as a whole requires a gradient; a hook sets that of the old rows to zero, and without
    weight decay AdamW leaves a weight alone whose gradient has always been zero. After the block
    all weights train that did before.
    """
    before = {weight: weight.requires_grad for weight in model.parameters()}
    model.requires_grad_(False)

    def keep_new(gradient: Tensor) -> Tensor:
        kept = gradient.clone()
        kept[:first] = 0
        return kept

    matrices = _token_matrices(model)
    for weight in matrices:
        weight.requires_grad_(True)
        mark_rows(weight, range(first, len(weight)))
    hooks = [weight.register_hook(keep_new) for weight in matrices]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for weight, trains in before.items():
            weight.requires_grad_(trains)


def mark_rows(weight: Tensor, ids: Sequence[int]) -> None:
    """Note on an embedding matrix which of its rows train, for `save_adapter`."""
    weight.trained_rows = list(ids)


def trained_rows(weight: Tensor) -> list[int] | None:
    """What `mark_rows` noted, or None."""
    return getattr(weight, "trained_rows", None)


def _token_matrices(model: "PreTrainedModel") -> list[Tensor]:
    """The embedding matrix (V, C), and the head's (V, C) if it is another one."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return [embedding] if head is embedding else [embedding, head]
