"""A dry run: a model's forward pass on shapes alone, to count what training would keep of it.

On torch's meta device tensors have shapes and no memory. The model is built there from its config,
the method's own code puts its weights in, a few tokens pass, and autograd's hooks say what is kept
for the backward pass, block by block. So any dense transformers model is counted, in a fraction of
a second, by the code that would train it.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from course_lib import adalora, lora, memory, shapes, surgery
from course_lib.runtime import CourseError, first_line, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MOST_BLOCKS = 200
NOT_DENSE = ("experts", "mamba", "ssm")  # in the name of a setting
PRODUCTS = (linear, torch.matmul, Tensor.matmul, torch.addmm)  # addmm: GPT-2's Conv1D
PROBE = 16  # tokens that pass; what is kept grows in proportion


@dataclass(frozen=True)
class Shape:
    """What a method makes of a model: numbers of weights, and bytes for each token.

    base: weights of the model itself; linear: of them, those of the layers that QLoRA quantises
    trained: weights that train in each block, and trained_outside of the blocks; embeddings: of
        them, those of the input, which are the head if `tied`
    kept: for the backward pass, in each block, and pairs: for each token of a row and each other;
        inputs: the same of a checkpointed one; outside:
        before the first block and after the last
    widest: the widest layer of a block; largest: weights of the largest one
    """

    base: int
    linear: int
    trained: tuple[int, ...]
    trained_outside: int
    embeddings: int
    tied: bool
    kept: tuple[float, ...]
    pairs: float
    inputs: tuple[float, ...]
    outside: float
    vocabulary: int
    widest: int
    largest: int


@lru_cache
def shape_of(
    name: str,
    method: str,
    size: int,
    targets: surgery.Targets,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    padded: bool,
) -> Shape:
    """What `method` makes of the model called `name`.

    size: the rank, the tokens or the width of the method; targets: of LoRA and AdaLoRA
    dtype: of the base's weights; those that a method adds are float32
    autocast: the dtype in which matrices are multiplied; None takes them as they are
    padded: rows are, so that attention needs a mask, and each head keys and values of its own
    Raises CourseError for models whose forward pass needs numbers.
    """
    config = shapes.config_of(name)
    _check(config, name)
    model = surgery.empty_model(config).to(dtype).train()
    blocks, head = memory.blocks_of(model), model.get_output_embeddings()
    if not blocks or head is None:
        found = f"a {type(model).__name__} has no blocks or head that can be told apart"
        raise CourseError(f"{found}: plan for a causal language model of transformers")
    base = model.num_parameters()
    layers = surgery.find_layers(model, surgery.ALL_LINEAR).values()
    layer_shapes = [surgery.layer_shape(layer) for layer in layers]
    sizes = [d_out * d_in for d_out, d_in in layer_shapes]
    left_out = _leave_two(model, blocks)  # each of them is as the last that is left
    blocks = memory.blocks_of(model)
    trained, trained_outside, beside = _put_in(model, blocks, method, size, targets)
    embeddings = model.get_input_embeddings().weight
    try:
        kept, pairs, inputs, outside = _kept(model, blocks, autocast, padded)
    except Exception as error:  # whatever a model does that needs numbers
        found = f"a {type(model).__name__} cannot run on shapes alone ({first_line(error)})"
        raise CourseError(f"{found}: plan for a model of another family") from None
    if pairs is None:
        found = f"a {type(model).__name__} does not call torch's attention once a block"
        raise CourseError(f"{found}, so it cannot be counted: plan for one of another family")
    return Shape(
        base=base,
        linear=sum(sizes),
        trained=trained + trained[-1:] * left_out,
        trained_outside=trained_outside,
        embeddings=embeddings.numel() if embeddings.requires_grad else 0,
        tied=embeddings is head.weight,
        kept=tuple(count + beside for count in kept + kept[-1:] * left_out),
        pairs=pairs,
        inputs=inputs + inputs[-1:] * left_out,
        outside=outside,
        vocabulary=head.weight.shape[0],
        widest=max(map(max, layer_shapes)),
        largest=max(sizes),
    )


def _leave_two(model: nn.Module, blocks: list[nn.Module]) -> int:
    """Take all blocks but two out of the model, if they are alike; how many that were. The first
    is another than the second: with an adapter no gradient leaves it, and what all share is its.
    """
    made_of = {
        tuple((name, weight.shape) for name, weight in block.named_parameters()) for block in blocks
    }
    stacks = [
        stack
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList) and [*stack] == blocks
    ]
    if len(made_of) > 1 or len(stacks) != 1:
        return 0
    del stacks[0][2:]
    return max(0, len(blocks) - 2)


def _check(config: "PreTrainedConfig", name: str) -> None:
    """Raise CourseError for a config of a model that is not counted."""
    text = config.get_text_config()
    blocks = getattr(text, "num_hidden_layers", 1)
    if not 1 <= blocks <= MOST_BLOCKS:
        found = f"{name} has {blocks:,} blocks"
        raise CourseError(f"{found}, expected 1 to {MOST_BLOCKS:,}: correct its config.json")
    for key, value in text.to_dict().items():
        if value not in (None, 0, 1) and any(part in key for part in NOT_DENSE):
            found = f"{name} has {key}={str(value)[:40]}, and only dense blocks are counted"
            raise CourseError(f"{found}: plan for a model without experts or state spaces")


def _put_in(
    model: "PreTrainedModel",
    blocks: list[nn.Module],
    method: str,
    size: int,
    targets: surgery.Targets,
) -> tuple[tuple[int, ...], int, float]:
    """Make the weights of a method train in an empty model. Weights that train in each block, and
    outside; and bytes for each token that a block keeps for them beside what `_kept` finds.
    """
    if method not in ("full", "lora", "adalora", "norms"):
        return _counted(model, len(blocks), method, size)
    with torch.device("meta"):
        if method == "lora":
            lora.add_lora(model, size, size, targets)
        elif method == "adalora":
            adalora.add_adalora(model, size, size, targets)
        elif method == "norms":
            norms = [one for one in model.modules() if "Norm" in type(one).__name__]
            model.requires_grad_(False)
            for norm in norms:
                norm.requires_grad_(True)
    in_blocks = [surgery.count_parameters(block).trained for block in blocks]
    return tuple(in_blocks), surgery.count_parameters(model).trained - sum(in_blocks), 0.0


def _counted(
    model: "PreTrainedModel", blocks: int, method: str, size: int
) -> tuple[tuple[int, ...], int, float]:
    """As `_put_in`, of methods that are not built but counted: a frozen base, through which the
    gradient goes down to the embeddings.
    """
    config = model.config.get_text_config()
    width = config.hidden_size
    kv = memory.kv_cache_bytes(config, 1, 1, 1) // (2 * config.num_hidden_layers)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output.requires_grad_()
    )
    if method == "prompt":
        return (0,) * blocks, size * width, 0.0
    in_block, beside = {
        "prefix": (2 * kv * size, 0.0),
        "ia3": (2 * kv + inner, 4.0 * (2 * kv + inner)),  # what is scaled, in float32
        "adapter": (2 * (2 * size * width + size + width), 2 * 4.0 * (width + 2 * size)),
    }[method]
    return (in_block,) * blocks, 0, beside


class _AsOnGpu(TorchFunctionMode):
    """Functions that the meta device would take otherwise than a GPU does: attention by the fused
    kernels, in place of the one that keeps the probabilities of all pairs of tokens, and products
    under autocast, if `dtype` is not None.
    """

    def __init__(self, kept: memory.Kept, dtype: torch.dtype | None, padded: bool):
        super().__init__()
        self.kept, self.dtype, self.padded = kept, dtype, padded
        self.calls, self.pairs = 0, 0.0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is scaled_dot_product_attention:
            q, k, v = args[:3]
            self.calls += 1
            if q.shape[1] != k.shape[1] and not (kwargs or {}).get("enable_gqa"):
                self.pairs += q.shape[1] * q.element_size()  # no fused kernel takes it (Falcon-7B)
            self.pairs += q.element_size() if self.padded else 0  # the mask
            return _Attention.apply(q, k, v, self.padded)
        if self.dtype is not None and function in PRODUCTS:
            args = [self._cast(one) if isinstance(one, Tensor) else one for one in args]
        return function(*args, **(kwargs or {}))

    def _cast(self, tensor: Tensor) -> Tensor:
        cast = tensor.to(self.dtype)
        if isinstance(tensor, nn.Parameter):
            self.kept.ignore(cast)  # as large whatever the number of tokens
        return cast


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(context, q: Tensor, k: Tensor, v: Tensor, padded: bool) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        heads = q.shape[1] // k.shape[1]
        if padded and heads > 1:
            k, v = (tensor.repeat_interleave(heads, 1) for tensor in (k, v))
        normaliser = q.new_empty(q.shape[:-1], dtype=torch.float32)
        context.save_for_backward(q, k, v, out, normaliser)
        return out

    @staticmethod
    def backward(context, gradient: Tensor) -> None:
        raise NotImplementedError("shapes have no gradient")


def _kept(
    model: nn.Module, blocks: list[nn.Module], autocast: torch.dtype | None, padded: bool
) -> tuple[tuple[float, ...], float | None, tuple[float, ...], float]:
    """Bytes for each token that a forward pass keeps: of each block; for each pair of tokens, None
    if attention is not torch's; of each block's input; of what is before and after the blocks.
    """
    kept, at = memory.Kept(model), []
    as_on_gpu = _AsOnGpu(kept, autocast, padded)

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tensor)
        return tensor

    inputs = []

    def enter(block: nn.Module, unnamed: tuple, named: dict) -> None:
        hidden = unnamed[0] if unnamed else named["hidden_states"]
        inputs.append(hidden.numel() * hidden.element_size() / PROBE)
        at.append(kept.bytes)

    def leave(block: nn.Module, inputs: tuple, output: object) -> None:
        at.append(kept.bytes)

    for block in blocks:
        block.register_forward_pre_hook(enter, with_kwargs=True)
        block.register_forward_hook(leave)
    ids = torch.zeros(1, PROBE, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, PROBE, PROBE, device="meta")  # as it is, since it has four dimensions
    with (
        as_on_gpu,
        saved_tensors_hooks(keep, lambda tensor: tensor),
        quiet_transformers(),
    ):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    in_blocks = [(end - start) / PROBE for start, end in zip(at[::2], at[1::2], strict=True)]
    pairs = as_on_gpu.pairs / len(blocks) if as_on_gpu.calls == len(blocks) else None
    return tuple(in_blocks), pairs, tuple(inputs), kept.bytes / PROBE - sum(in_blocks)
