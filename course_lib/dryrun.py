"""A dry run: a model's forward pass on shapes alone, to count what training would keep of it.

On torch's meta device tensors have shapes and no memory. The model is built there from its config,
the method's own code puts its weights in, a few tokens pass, and autograd's hooks say what is kept
for the backward pass, block by block. So any dense transformers model is counted, in a fraction of
a second, by the code that would train it.
"""

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from course_lib import adalora, adapters, lora, memory, prefix, shapes, surgery
from course_lib.runtime import CourseError, first_line, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MOST_BLOCKS = 200
NOT_DENSE = ("experts", "mamba", "ssm")  # in the name of a setting
PRODUCTS = (linear, torch.matmul, Tensor.matmul, torch.addmm)  # addmm: GPT-2's Conv1D
PROBE = 16  # tokens that pass; what is kept grows in proportion, but for a prefix
METHODS = {  # what puts the weights of a method into a model: size, targets of LoRA and AdaLoRA
    "full": lambda model, size, targets: None,
    "lora": lambda model, size, targets: lora.add_lora(model, size, size, targets),
    "adalora": lambda model, size, targets: adalora.add_adalora(model, size, size, targets),
    "prompt": lambda model, size, targets: prefix.add_soft_prompt(model, size),
    "prefix": lambda model, size, targets: prefix.add_prefix(model, size),
    "ia3": lambda model, size, targets: adapters.add_ia3(model),
    "adapter": lambda model, size, targets: adapters.add_bottlenecks(model, size),
    "parallel": lambda model, size, targets: adapters.add_parallel(model, size),
    "bitfit": lambda model, size, targets: adapters.train_biases(model),
    "norms": lambda model, size, targets: adapters.train_norms(model),
}


@dataclass(frozen=True)
class Shape:
    """What a method makes of a model: numbers of weights, and bytes for each token.

    base: weights of the model itself; frozen: of them, those that do not train; linear: those of
        the layers that QLoRA quantises
    trained: weights that train in each block, and trained_outside of the blocks; embeddings: of
        them, those of the input, which are the head if `tied`
    kept: for the backward pass, in each block, and pairs: for each token of a row and each other;
        inputs: the same of a checkpointed one; outside: before the first block and after the last
    rows: bytes that each block keeps for a row, however long it is: keys and values of a prefix
    widest: the widest layer of a block; largest: weights of the largest one
    """

    base: int
    frozen: int
    linear: int
    trained: tuple[int, ...]
    trained_outside: int
    embeddings: int
    tied: bool
    kept: tuple[float, ...]
    pairs: float
    inputs: tuple[float, ...]
    outside: float
    rows: tuple[int, ...]
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
    base = _base(name)
    model = copy.deepcopy(base.model).to(dtype)
    blocks, head = memory.blocks_of(model), model.get_output_embeddings()
    before = {id(weight) for weight in model.parameters()}
    with torch.device("meta"):
        METHODS[method](model, size, targets)
    trained = tuple(surgery.count_parameters(block).trained for block in blocks)
    own = [_own_trained(block, before) for block in blocks]
    own.append(_own_trained(model, before) - sum(own) + own[-1] * base.left_out)
    embeddings = model.get_input_embeddings().weight
    try:
        one = _kept(model, blocks, autocast, padded, PROBE)
        two = _kept(model, blocks, autocast, padded, 2 * PROBE) if _has_prefix(model) else None
    except CourseError:
        raise
    except Exception as error:  # whatever a model does that needs numbers
        found = f"a {type(model).__name__} cannot run on shapes alone ({first_line(error)})"
        raise CourseError(f"{found}: plan for a model of another family") from None
    if one.pairs is None:
        found = f"a {type(model).__name__} does not call torch's attention once a block"
        raise CourseError(f"{found}, so it cannot be counted: plan for one of another family")
    rows = (0,) * len(blocks)
    if two is not None:  # b + c T twice, less b + c 2 T, is b
        rows = tuple(2 * few - many for few, many in zip(one.blocks, two.blocks, strict=True))
    kept = tuple((count - row) / one.tokens for count, row in zip(one.blocks, rows, strict=True))
    inputs = tuple(count / one.tokens for count in one.inputs)
    return Shape(
        base=base.weights,
        frozen=base.weights - sum(own),
        linear=base.linear,
        trained=trained + trained[-1:] * base.left_out,
        trained_outside=surgery.count_parameters(model).trained - sum(trained),
        embeddings=embeddings.numel() if embeddings.requires_grad else 0,
        tied=embeddings is head.weight,
        kept=kept + kept[-1:] * base.left_out,
        pairs=one.pairs,
        inputs=inputs + inputs[-1:] * base.left_out,
        outside=one.outside / one.tokens,
        rows=rows + rows[-1:] * base.left_out,
        vocabulary=head.weight.shape[0],
        widest=base.widest,
        largest=base.largest,
    )


def _own_trained(module: nn.Module, before: set[int]) -> int:
    """How many weights train that were there before the method came; before: their ids."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    return sum(weight.numel() for weight in weights if id(weight) in before)


@dataclass(frozen=True)
class _Base:
    """An empty model of which two blocks are left, if it has more and they are alike, and what the
    whole of it was: its weights, those of its linear layers, and the blocks that were left out.
    """

    model: "PreTrainedModel"
    weights: int
    linear: int
    widest: int
    largest: int
    left_out: int


@lru_cache
def _base(name: str) -> _Base:
    config = shapes.config_of(name)
    _check(config, name)
    model = surgery.empty_model(config).train()
    blocks = memory.blocks_of(model)
    if not blocks or model.get_output_embeddings() is None:
        found = f"a {type(model).__name__} has no blocks or head that can be told apart"
        raise CourseError(f"{found}: plan for a causal language model of transformers")
    layers = surgery.find_layers(model, surgery.ALL_LINEAR).values()
    layer_shapes = [surgery.layer_shape(layer) for layer in layers]
    sizes = [d_out * d_in for d_out, d_in in layer_shapes]
    return _Base(
        weights=model.num_parameters(),
        linear=sum(sizes),
        widest=max(map(max, layer_shapes)),
        largest=max(sizes),
        left_out=_leave_two(model, blocks),  # each of them is as the last that is left
        model=model,
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


def _has_prefix(model: nn.Module) -> bool:
    return isinstance(prefix.virtual_tokens(model), prefix.Prefix)


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
            before = k.shape[2] - q.shape[2]  # keys of a prefix, for which there is always a mask
            padded = self.padded or before > 0
            self.kept.bytes += before * q.shape[2] * q.element_size()
            if q.shape[1] != k.shape[1] and not (kwargs or {}).get("enable_gqa"):
                self.pairs += q.shape[1] * q.element_size()  # no fused kernel takes it (Falcon-7B)
            self.pairs += q.element_size() if padded else 0  # the mask
            return _Attention.apply(q, k, v, padded)
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
        rows, of_queries, tokens, _ = q.shape
        # as the kernels lay it, so that the heads side by side are no copy
        out = q.new_empty(rows, tokens, of_queries, v.shape[-1]).transpose(1, 2)
        heads = q.shape[1] // k.shape[1]
        if padded and heads > 1:
            k, v = (tensor.repeat_interleave(heads, 1) for tensor in (k, v))
        normaliser = q.new_empty(q.shape[:-1], dtype=torch.float32)
        context.save_for_backward(q, k, v, out, normaliser)
        return out

    @staticmethod
    def backward(context, gradient: Tensor) -> None:
        raise NotImplementedError("shapes have no gradient")


@dataclass(frozen=True)
class _Pass:
    """Bytes that a forward pass of one row keeps: in each block, of each block's input, before and
    after the blocks; and for each pair of tokens of a row, None if attention is not torch's.

    tokens: that the blocks got, with those of a soft prompt
    """

    tokens: int
    blocks: tuple[int, ...]
    inputs: tuple[int, ...]
    outside: int
    pairs: float | None


def _kept(
    model: nn.Module,
    blocks: list[nn.Module],
    autocast: torch.dtype | None,
    padded: bool,
    length: int,
) -> _Pass:
    kept, at, inputs = memory.Kept(model), [], []
    as_on_gpu = _AsOnGpu(kept, autocast, padded)
    needs_mask = padded or _has_prefix(model)

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tensor)
        return tensor

    def give_mask(model: nn.Module, unnamed: tuple, named: dict) -> tuple[tuple, dict]:
        # made here, since transformers looks at numbers to make one
        text = named["input_ids"] if named.get("inputs_embeds") is None else named["inputs_embeds"]
        tokens = text.shape[1]
        return unnamed, named | {"attention_mask": torch.zeros(1, 1, tokens, tokens, device="meta")}

    def enter(block: nn.Module, unnamed: tuple, named: dict) -> tuple[tuple, dict]:
        inputs.append(unnamed[0] if unnamed else named["hidden_states"])
        at.append(kept.bytes)
        if "attention_mask" in named and not needs_mask:  # nor would transformers give one
            named = named | {"attention_mask": None}
        return unnamed, named

    def leave(block: nn.Module, inputs: tuple, output: object) -> None:
        at.append(kept.bytes)

    hooks = [model.register_forward_pre_hook(give_mask, with_kwargs=True)]
    for block in blocks:
        hooks.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(block.register_forward_hook(leave))
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    with (
        as_on_gpu,
        saved_tensors_hooks(keep, lambda tensor: tensor),
        quiet_transformers(),
    ):
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    in_blocks = tuple(end - start for start, end in zip(at[::2], at[1::2], strict=True))
    return _Pass(
        tokens=inputs[0].shape[-2],
        blocks=in_blocks,
        inputs=tuple(hidden.numel() * hidden.element_size() for hidden in inputs),
        outside=kept.bytes - sum(in_blocks),
        pairs=as_on_gpu.pairs / len(blocks) if as_on_gpu.calls == len(blocks) else None,
    )
