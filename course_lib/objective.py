"""What training minimises and evaluation reports: -log p(token) at the supervised positions.

    loss = mean over the supervised positions of -log p(token | the tokens before it)

It is the library's loss; but only the supervised positions go through the output head. For SmolLM2
the head is 28.3M of 134.5M weights and the prompt three quarters of a row: docs/decisions.md has
the gain.
"""

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from course_lib.batching import IGNORED
from course_lib.runtime import CourseError, TrainingError

Batch = dict[str, Tensor]


def supervised_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (K, V) at the K positions whose next token is supervised, and these tokens (K,).

    batch: input_ids, attention_mask, labels, each (N, T); or what `collate_packed` makes
    """
    labels = batch["labels"][:, 1:]  # position t predicts token t + 1
    supervised = labels != IGNORED  # (N, T - 1)
    if not supervised.any():
        raise CourseError(
            "a batch has no supervised token, so its loss is undefined: every label is -100"
        )

    def keep_supervised(head: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        # (N, T, C), without a soft prompt before it
        hidden = inputs[0][:, -batch["labels"].shape[1] :]
        return (hidden[:, :-1][supervised].unsqueeze(0),)  # (1, K, C)

    # DDP keeps the model in `module`
    head = getattr(model, "module", model).get_output_embeddings()
    hook = head.register_forward_pre_hook(keep_supervised)
    try:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    return logits[0].float(), labels[supervised]


def supervised_loss(model: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
    """Cross-entropy of the next token where labels are not -100; equal to the library's loss.

    batch: as for `supervised_logits`
    reduction: "mean" or "sum" over supervised positions
    """
    return cross_entropy(*supervised_logits(model, batch), reduction=reduction)


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """`supervised_loss` as `finetune` takes a loss: the sum over the supervised positions of
    `batch`.
    """
    return supervised_loss(model, batch, reduction="sum")


def checked_sum(loss: Tensor) -> Tensor:
    """`loss`, if training can go back from it. Raises TrainingError, which says why not."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        advice = "a tensor of one number, the sum over the supervised tokens of the batch"
        raise TrainingError(f"found a loss {found}, expected {advice}")
    if not loss.requires_grad:
        found = "the loss depends on no weight that trains"
        raise TrainingError(f"{found}: choose an adapter with use_adapters")
    return loss
