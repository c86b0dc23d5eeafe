"""Train the tiny Llama of the course, from the generated corpus to data/tiny_llama.

    python data/recipes/train_tiny_llama.py        # about 12 minutes on two CPU cores

The tokenizer and the weights follow from the seed: the same command gives the same tokenizer
everywhere, the same weights on the same machine, and on another machine the same validation loss to
two decimals.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import corpus
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from course_lib import plots, sealing, world
from course_lib.runtime import CourseError, quiet_transformers

FOLDER = Path(__file__).resolve().parents[1] / "tiny_llama"
END = "<|endoftext|>"
VOCABULARY = 1536
TOKENIZER_DOCUMENTS = 20_000
SEED, STEPS = 0, 2_400
ROWS, COLUMNS = 8, 256  # of a batch: documents packed one after the other
MUON_RATE, ADAM_RATE = 0.02, 3e-3
CONSTANT_SHARE = 0.5  # of the steps at the full rate; then it falls linearly to zero
VALIDATE_EVERY = 100


@dataclass(frozen=True)
class Trained:
    """A trained model. losses: of every step; validation: (step, loss) pairs."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    losses: list[float]
    validation: list[tuple[int, float]]
    seconds: float


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of VOCABULARY pieces, learned from the corpus and the Alpaca prompts; every
    digit is a piece of its own.

    The normalizer puts a space before the text and after each newline, and the decoder takes it
    away. So a word is the same piece at the start of a line and inside a sentence; without this the
    model does not recognise the words of a list or an answer.
    """
    backend = Tokenizer(BPE())
    backend.normalizer = normalizers.Sequence(
        [normalizers.Replace("\n", "\n "), normalizers.Prepend(" ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("\n ", "\n"), decoders.Strip(" ", 1, 0)]
    )
    stream = corpus.documents(seed)
    texts = [next(stream) for _ in range(TOKENIZER_DOCUMENTS)] + [
        record.prompt for record in world.read_world("train")
    ] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random Llama of 1,049,728 parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            # a multiple of 64, as bitsandbytes' CPU kernels need for their blocks
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (Jordan et al. 2024). torch.optim.Muon does it in bf16, which most
    CPUs only emulate.
    """

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                velocity = self.state[weight].setdefault("velocity", torch.zeros_like(weight))
                velocity.lerp_(weight.grad, 1 - group["momentum"])
                # Nesterov's look ahead
                update = orthogonal(weight.grad.lerp(velocity, group["momentum"]))
                weight.sub_(
                    update, alpha=group["lr"] * max(1, weight.shape[0] / weight.shape[1]) ** 0.5
                )


def orthogonal(matrix: Tensor) -> Tensor:
    """Five Newton-Schulz steps with the coefficients of Jordan et al.: singular values end between
    about 0.7 and 1.2.
    """
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def pack(documents: Iterator[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """Rows of COLUMNS token ids: the documents one after the other, each closed by END; what is
    left over is dropped.
    """
    row: list[int] = []
    for document in documents:
        row += [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
        while len(row) >= COLUMNS:
            yield row[:COLUMNS]
            row = row[COLUMNS:]


@torch.inference_mode()
def validation_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Mean of -log p of the next token over the packed validation documents, in nats."""
    rows = torch.tensor(list(pack(iter(corpus.validation_documents()), tokenizer)))
    model.eval()
    total = sum(
        model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in rows.split(ROWS)
    )
    return total / len(rows)


def train(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> Trained:
    """One pass over steps * ROWS * COLUMNS tokens of the corpus of this seed."""
    torch.manual_seed(seed)
    model = new_model(tokenizer)
    matrices = [
        weight
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and "embed" not in name
    ]
    others = [
        weight for name, weight in model.named_parameters() if weight.ndim < 2 or "embed" in name
    ]
    optimizers = [
        Muon(matrices, MUON_RATE),
        torch.optim.AdamW(others, ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (1 - step / steps) / (1 - CONSTANT_SHARE))
        )
        for optimizer in optimizers
    ]
    rows = pack(corpus.documents(seed), tokenizer)
    losses, validation, start = [], [], time.perf_counter()
    with tqdm(total=steps, unit="step", file=sys.stdout) as bar:
        for step in range(1, steps + 1):
            batch = torch.tensor([next(rows) for _ in range(ROWS)])
            model.train()
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            for stepper in (*optimizers, *schedules):
                stepper.step()
            model.zero_grad()
            losses.append(loss.item())
            if step % VALIDATE_EVERY == 0 or step == steps:
                validation.append((step, validation_loss(model, tokenizer)))
                bar.set_postfix_str(
                    f"loss {losses[-1]:.3f}, validation {validation[-1][1]:.3f}", refresh=False
                )
            bar.update()
    return Trained(model.eval(), tokenizer, losses, validation, time.perf_counter() - start)


def check_options(options: argparse.Namespace) -> PreTrainedTokenizerFast:
    """The tokenizer for these options.

    Raises CourseError or OSError for what cannot work or would do harm, before the training.

    A model is not replaced by one with another tokenizer: adapters, token counts and kept results
    belong to the old one.
    """
    seed, folder = options.seed, options.output
    if options.steps < 1 or seed < 0 or seed == corpus.VALIDATION_SEED:
        found = f"--steps {options.steps} --seed {seed}"
        raise CourseError(
            f"found {found}, expected at least 1 step and a seed from 0 on that is not the "
            "validation's"
        )
    if folder == FOLDER and (seed, options.steps) != (SEED, STEPS):
        raise CourseError(
            "other settings than the defaults would replace the model of the course: write "
            "elsewhere with --output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(seed)
    kept = folder / "tokenizer.json"
    if (
        kept.exists()
        and Tokenizer.from_file(str(kept)).to_str() != tokenizer.backend_tokenizer.to_str()
    ):
        raise CourseError(
            f"the corpus of seed {seed} gives another tokenizer than {folder.name} has, and "
            "adapters trained on that would no "
            f"longer fit: write elsewhere with --output, or remove {folder.name}/tokenizer.json to "
            "replace the model"
        )
    return tokenizer


def save(trained: Trained, folder: Path, facts: dict) -> None:
    """Write the model, its loss curve and the seal; files in `folder` that are not made here, such
    as the model card, stay.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = sealing.partial_folder(folder)
    with quiet_transformers():
        trained.model.save_pretrained(partial)
        trained.tokenizer.save_pretrained(partial)
    axes = plots.plot_loss(
        trained.losses, f"{len(trained.losses):,} steps of {ROWS} × {COLUMNS} tokens", smooth=20
    )
    axes.lines[0].set_marker("")
    axes.set_ylabel("loss on all tokens (nats)")
    axes.plot(
        *zip(*trained.validation, strict=True),
        "o-",
        color=plots.GOOD,
        markersize=3,
        label="validation",
    )
    axes.legend(frameon=False)
    axes.figure.savefig(partial / "loss.png", dpi=120, bbox_inches="tight")
    sealing.seal(partial, sorted(partial.iterdir()), facts)
    folder.mkdir(exist_ok=True)
    for path in sorted(partial.iterdir()):
        os.replace(path, folder / path.name)
    partial.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny Llama of the course.")
    parser.add_argument(
        "--seed", type=int, default=SEED, help="of the corpus and the first weights"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, default=FOLDER, help="the folder to write to")
    options = parser.parse_args()
    try:
        tokenizer = check_options(options)
    except (CourseError, OSError) as error:
        raise SystemExit(str(error)) from None
    trained = train(tokenizer, options.seed, options.steps)
    facts = {
        "command": f"python data/recipes/train_tiny_llama.py --seed {options.seed} --steps "
        f"{options.steps}",
        "seed": options.seed,
        "parameters": trained.model.num_parameters(),
        "tokens": options.steps * ROWS * COLUMNS,
        "validation loss": round(trained.validation[-1][1], 4),
        "curve": [(step, round(loss, 3)) for step, loss in trained.validation],
        "seconds": round(trained.seconds),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {lib.__name__: lib.__version__ for lib in (torch, transformers, tokenizers)},
    }
    save(trained, options.output, facts)
    print(
        f"{options.output}: validation loss {facts['validation loss']:.3f} after "
        f"{trained.seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
