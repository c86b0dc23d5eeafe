"""Virtual tokens and adapters: the course's own against peft's, and a prompt against its keys and
values.

SmolLM2-135M in float32 on the task of the week. A step is collating, forward, backward, clipping
and AdamW; a run is 4 steps on batches of 4 random records. Prefixes have 20 tokens, and both sides
the same table. peft's prefix is a cache that is made anew in each pass, ours is in the attention
function. Answers are of 16 tokens, eight questions in a batch; the prompt is the ten examples of
Day 1, 364 tokens.
"""

from time import perf_counter

import pytest
import torch
from peft import IA3Config, PrefixTuningConfig, get_peft_model
from torch import nn

from course_lib import adapters, evaluation, lora, models, prefix
from course_lib.objective import Batch, supervised_loss
from tests.benchmarks.bench_adalora import base, batches, steps  # noqa: F401
from tests.benchmarks.bench_lora import ALPHA, RANK, STEPS, largest_difference, sharing
from tests.benchmarks.measuring import Arm, interleaved

TOKENS, WIDTH, ANSWER_TOKENS = 20, 16, 16


def nothing(model: nn.Module, step: int) -> None:
    """After a step."""


def pefts_prefix(model: nn.Module, table: torch.Tensor) -> nn.Module:
    settings = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(table))
    model = get_peft_model(model, settings)
    model.prompt_encoder["default"].load_prompt_embeddings(table)
    return model


def pefts_ia3(model: nn.Module, table: torch.Tensor) -> nn.Module:
    return get_peft_model(model, IA3Config(task_type="CAUSAL_LM"))


@pytest.mark.parametrize("method", ["prefix tuning", "IA3"])
def test_a_step_is_as_fast_as_pefts(method, base, batches: list[Batch], row):  # noqa: F811
    ours, theirs, plain = (sharing(base).model for _ in range(3))
    lora.add_lora(plain, RANK, ALPHA, "all-linear")
    table = torch.empty(0)
    if method == "IA3":
        adapters.add_ia3(ours)
    else:
        prefix.add_prefix(ours, TOKENS)
        table = prefix.virtual_tokens(ours).table.detach()
    theirs = (pefts_ia3 if method == "IA3" else pefts_prefix)(theirs, table)
    found: dict[str, list[float]] = {"ours": [], "peft": [], "LoRA": []}
    models_of = {"ours": ours, "peft": theirs, "LoRA": plain}
    rounds = interleaved(
        {
            name: steps(model, batches, supervised_loss, nothing, found[name])
            for name, model in models_of.items()
        }
    )
    ratio = rounds.times_faster
    row(f"{method}: a step of ours", [each / STEPS for each in rounds.seconds["ours"]], "s")
    row(f"{method}: seconds, ours / peft", ratio("peft", than="ours"), "times", at_most=1.1)
    row(f"{method}: seconds, ours / LoRA", ratio("LoRA", than="ours"), "times", at_most=1.1)
    row(
        f"{method}: largest difference in the loss of a step, ours and peft",
        largest_difference(found["ours"], found["peft"]),
        "nats",
        at_most=1e-3,
    )


def test_kept_keys_and_values_answer_faster_than_the_prompt(base, row):  # noqa: F811
    asked, shots = evaluation.read_task("test")[:8], evaluation.draw_examples(0)
    prompts = [evaluation.chat_prompt(base, evaluation.asked(one), shots) for one in asked]
    shared = prefix.shared_start(prompts)
    kept = sharing(base).model
    prefix.add_prefix(kept, len(shared), start=prefix.states_of(kept, shared))
    rests = [prompt[len(shared) :] for prompt in prompts]
    rounds = interleaved(
        {
            "prompt": answers(base, base.model, prompts),
            "kept": answers(base, kept, rests),
            "untouched": answers(base, base.model, rests),
        }
    )
    ratio = rounds.times_faster
    row("eight answers behind the ten examples", rounds.seconds["prompt"], "s")
    row("the same from their keys and values", rounds.seconds["kept"], "s")
    row("prompt / keys and values", ratio("kept", than="prompt"), "times", at_least=2.0)
    row("keys and values / no prompt", ratio("untouched", than="kept"), "times", at_most=1.5)


def answers(base: models.Loaded, model: nn.Module, prompts: list[list[int]]) -> Arm:  # noqa: F811
    """An arm: one batch, padded on the left; no reply ends early."""
    longest, pad_id = max(map(len, prompts)), base.tokenizer.pad_token_id
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"do_sample": False, "min_new_tokens": ANSWER_TOKENS, "pad_token_id": pad_id}

    def arm() -> tuple[float, int]:
        start = perf_counter()
        with torch.inference_mode():
            model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=ANSWER_TOKENS, **options
            )
        return perf_counter() - start, ANSWER_TOKENS * len(prompts)

    return arm
