"""The memory bill of training: bytes of weights, gradients and optimizer states for each parameter.

Adam keeps two moments of each weight: in torch in the format of the weight, in mixed precision in
float32. Activations depend on batch and length and come on top; one bill in use sets eight bytes
aside for them, and `activation_bytes` counts what a forward pass really keeps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from course_lib.runtime import CourseError, quiet_transformers
from course_lib.surgery import check_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Bill:
    """Bytes for each trained parameter. other: the float32 master copy of mixed precision, or what
    is set aside for activations.
    """

    about: str
    source: str
    weights: int
    gradients: int
    moments: int
    other: int = 0

    @property
    def bytes_per_parameter(self) -> int:
        return self.weights + self.gradients + self.moments + self.other


BILLS = {
    "all bf16": Bill(
        about="everything in bf16, the moments too",
        source="torch.optim.AdamW on bf16 weights",
        weights=2, gradients=2, moments=4,
    ),
    "bf16": Bill(
        about="bf16 weights and gradients, float32 moments, no master copy",
        source="more than 780 GB for 65B in QLoRA, arXiv 2305.14314, section 1",
        weights=2, gradients=2, moments=8,
    ),
    "fp32": Bill(
        about="everything in float32, as on our CPU",
        source="four float32 numbers for each weight",
        weights=4, gradients=4, moments=8,
    ),
    "mixed, ZeRO": Bill(
        about="fp16 weights and gradients, float32 master copy and moments",
        source="ZeRO, arXiv 1910.02054, section 3.1",
        weights=2, gradients=2, moments=8, other=4,
    ),
    "mixed, HF": Bill(
        about="the same with float32 gradients",
        source="the transformers documentation on the anatomy of training memory",
        weights=2, gradients=4, moments=8, other=4,
    ),
    "fp32 + 8": Bill(
        about="float32, with eight bytes set aside for activations",
        source="the estimate of 4 + 20 bytes that many notes copy",
        weights=4, gradients=4, moments=8, other=8,
    ),
}  # fmt: skip


def training_bytes(parameters: int, bill: str) -> int:
    """Bytes to train `parameters` weights with Adam; `bill` is a key of BILLS.

    >>> training_bytes(1_000_000_000, "fp32 + 8")
    24000000000
    """
    if bill not in BILLS:
        raise CourseError(f"bill {bill!r} is not known, expected one of {', '.join(BILLS)}")
    return parameters * BILLS[bill].bytes_per_parameter


def kv_cache_bytes(config: "PreTrainedConfig", batch: int, length: int, bytes_each: int = 2) -> int:
    """Bytes of the keys and values of `batch` rows of `length` tokens, in every block.

    >>> from transformers import LlamaConfig
    >>> kv_cache_bytes(LlamaConfig(), batch=1, length=1)  # LLaMA-7B's shape, 16 bits
    524288
    """
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if getattr(text, "new_decoder_architecture", False):  # Falcon-40B
        heads = text.num_kv_heads
    elif getattr(text, "multi_query", False):  # Falcon-7B: one head for all
        heads = 1
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * width * batch * length * bytes_each


def stored_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of a model's weights and, of quantised ones, their constants: of its linear layers, of
    its embeddings (with a head that shares them), and of the rest, such as an adapter.
    """
    check_model(model)
    kinds = {
        f"{name}." if name else "": "embeddings"
        if isinstance(module, nn.Embedding)
        else "linear layers"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.Linear | Conv1D)
    }
    found, seen = dict.fromkeys(("linear layers", "embeddings", "rest"), 0), set()
    for name, tensor in model.state_dict().items():
        place = tensor.data_ptr() or name  # without memory, on the meta device, none is shared
        if place not in seen:
            seen.add(place)
            owners = [kinds[path] for path in kinds if name.startswith(path)]
            found[owners[0] if owners else "rest"] += tensor.numel() * tensor.element_size()
    return found


def checkpoint_blocks(model: nn.Module, count: int) -> None:
    """Keep of the first `count` blocks of a transformers model only the inputs; the backward pass
    computes the rest again.

    0 keeps everything. The model must be in train mode, and fp32, bf16 or fp16 alike get the same
    gradients as before. Paper: Chen et al. 2016, arXiv 1604.06174. transformers' own switch takes
    all blocks, or every n-th.
    """
    blocks = blocks_of(model)
    if type(count) is not int or not 0 <= count <= len(blocks):
        raise CourseError(
            f"count={count!r} blocks cannot be checkpointed, expected a whole number in "
            f"0..{len(blocks)}, the model's blocks"
        )
    if count:
        # the method has two names, one of which each release calls the old one
        with quiet_transformers():
            model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = module in blocks[:count]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformers model, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


class Kept:
    """Pieces of memory, each counted once; the weights of `model` count nothing. Those without
    memory, of the meta device, are told apart, too.
    """

    def __init__(self, model: nn.Module):
        self.weights = [weight.untyped_storage() for weight in model.parameters()]
        # held until all are counted, so that no other one gets its place
        self.storages = {id(storage): storage for storage in self.weights}
        self.bytes = 0

    def ignore(self, tensor: Tensor) -> None:
        """Count it nothing, as the weights."""
        storage = tensor.untyped_storage()
        self.storages.setdefault(id(storage), storage)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self.storages:
            self.storages[id(storage)] = storage
            self.bytes += storage.nbytes()


def activation_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What `forward` returns, and the bytes of activations that autograd then holds for the
    backward pass.

    Each piece of memory counts once, weights are left out. A checkpointed block of a transformers
    model keeps its inputs where autograd does not show them, so the inputs of all such blocks count
    as well, checkpointed or not.
    """
    kept = Kept(model)

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tensor)
        return tensor

    def keep_inputs(block: nn.Module, unnamed: tuple, named: dict) -> None:
        for value in (*unnamed, *named.values()):
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Tensor):
                    keep(part)

    hooks = [
        block.register_forward_pre_hook(keep_inputs, with_kwargs=True) for block in blocks_of(model)
    ]
    try:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            result = forward()
    finally:
        for hook in hooks:
            hook.remove()
    return result, kept.bytes
