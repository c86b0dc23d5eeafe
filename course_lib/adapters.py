"""Adapters: small layers beside or behind the frozen ones, and small parts of the model itself.

    bottleneck   h + W_up f(W_down h)       Houlsby et al. 2019, arXiv 1902.00751, section 2.1:
                                            behind attention and behind the feed-forward layers
    parallel     FFN(x) + s W_up f(W_down x)                He et al. 2021, arXiv 2110.04366
    MAM          a prefix, and parallel adapters            the same, section 4.6
    IA3          l_k * K, l_v * V, l_ff * f(W x)            Liu et al. 2022, arXiv 2205.05638
    BitFit       the biases                                 Ben Zaken et al. 2021, arXiv 2106.10199
    norms        the scales of the normalisations
    UniPELT      gates before a prefix, LoRA and adapters   Mao et al. 2021, arXiv 2110.07577

All begin as identity: W_up is zero, l is one, added biases are zero; except those with a prefix,
which takes a part of the attention from the first step on. f is ReLU. peft has IA3 and norm tuning
and no bottleneck adapters.

Two departures. Llama has no biases, so BitFit gives its linear layers some, which begin at zero.
UniPELT's gates average over the tokens of a text, which in a decoder would see the answer; here
those of LoRA and of the adapters look at each token alone, and that of a prefix is a number.

Letters: C width of the model, m width of a bottleneck, (..., C) any shape of tokens.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from course_lib import lora, memory, prefix, surgery
from course_lib.batching import IGNORED
from course_lib.objective import Batch, supervised_logits
from course_lib.runtime import CourseError
from course_lib.surgery import ORIGINALS, Addition, LinearWrapper, Targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WRITERS = {  # by family: the layers whose output is added to the stream of a block
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "gpt_neox": ["attention.dense", "dense_4h_to_h"],
    "opt": ["out_proj", "fc2"],
    "phi": ["dense", "fc2"],
} | {family: ["o_proj", "down_proj"] for family in ("gemma", "llama", "mistral", "qwen2", "qwen3")}
PARALLEL_SCALE = 4.0  # of He et al.
SUREST = -1e-6  # log-probability that unlikelihood still pushes down; at 0 it would be infinite


class Bottleneck(nn.Module):
    """scale W_up f(W_down x): (..., C) -> (..., C). 2 m C + C + m weights; zero at the start."""

    def __init__(self, width: int, bottleneck: int, scale: float = 1.0):
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.scale = scale
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def identity(self) -> float:
        """What tells a run with it from another, beside weights."""
        return self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.up(relu(self.down(x)))


class Beside(Addition):
    """A frozen module, and what an update adds to it.

    reads_output: the update reads what the module gives, and else what it is given
    gated: a gate for each token, sigmoid(w x + b), before what is added; w and b begin at zero,
        since large inputs would close it for good
    """

    def __init__(
        self,
        base: nn.Module,
        update: nn.Module,
        width: int,
        *,
        reads_output: bool,
        gated: bool = False,
    ):
        super().__init__()
        self.base, self.update, self.reads_output = base.requires_grad_(False), update, reads_output
        self.gate = nn.Linear(width, 1) if gated else None
        if gated:
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.base(x)
        read = h if self.reads_output else x
        added = self.update(read.to(next(self.update.parameters()).dtype))
        if self.gate is not None:
            added = added * self.gate(read.to(self.gate.weight.dtype)).sigmoid()
        return (h + added).to(h.dtype)


class BesideLinear(Beside, LinearWrapper):
    """The same in the place of a linear layer."""


class IA3Linear(Addition, LinearWrapper):
    """A frozen linear layer whose outputs, or whose inputs, are each multiplied with a number."""

    def __init__(self, base: nn.Module, on_input: bool):
        super().__init__()
        d_out, d_in = surgery.layer_shape(base)
        self.base, self.on_input = base.requires_grad_(False), on_input
        self.scale = nn.Parameter(torch.ones(d_in if on_input else d_out))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)"""
        if self.on_input:
            return self.base((x * self.scale).to(x.dtype))
        h = self.base(x)
        return (h * self.scale).to(h.dtype)

    def delta(self) -> Tensor:
        """What is added to the weight by a merge, (d_out, d_in)."""
        less = self.scale - 1
        return surgery.weight_matrix(self.base) * (less if self.on_input else less[:, None])

    def bias_delta(self) -> Tensor | None:
        """What is added to the bias by a merge."""
        return None if self.on_input or self.base.bias is None else self.bias * (self.scale - 1)


def add_bottlenecks(
    model: nn.Module, bottleneck: int, targets: Targets | None = None, *, seed: int = 0
) -> None:
    """Adapters of this width behind attention and behind the feed-forward layers of each block.

    targets: the linear layers they follow; None takes those of the model's family that write to the
        stream of a block
    Raises CourseError before anything is changed.
    """
    _check(model, bottleneck, seed)
    layers = surgery.find_layers(model, stream_writers(model) if targets is None else targets)
    model.requires_grad_(False)
    with prefix.seeded(seed):
        for path, layer in layers.items():
            width, _ = surgery.layer_shape(layer)
            update = Bottleneck(width, bottleneck)
            _replace(model, path, BesideLinear(layer, update, width, reads_output=True))


def add_parallel(
    model: nn.Module, bottleneck: int, scale: float = PARALLEL_SCALE, *, seed: int = 0
) -> None:
    """Adapters of this width beside the feed-forward layers of each block, which read what these
    read. Raises CourseError before anything is changed.
    """
    _check(model, bottleneck, seed, scale)
    paths = feedforward_modules(model)
    model.requires_grad_(False)
    _add_parallel(model, paths, bottleneck, scale, seed)


def _add_parallel(
    model: nn.Module, paths: Sequence[str], bottleneck: int, scale: float, seed: int
) -> None:
    width = model.config.get_text_config().hidden_size
    with prefix.seeded(seed):
        for path in paths:
            update = Bottleneck(width, bottleneck, scale)
            layer = model.get_submodule(path)
            _replace(model, path, Beside(layer, update, width, reads_output=False))


def add_mam(
    model: "PreTrainedModel",
    tokens: int,
    bottleneck: int,
    scale: float = PARALLEL_SCALE,
    *,
    hidden: int | None = None,
    seed: int = 0,
) -> None:
    """A prefix of `tokens`, made by an MLP of width `hidden`, and parallel adapters. Raises
    CourseError before anything is changed.
    """
    _check(model, bottleneck, seed, scale)
    paths = feedforward_modules(model)
    prefix.add_prefix(model, tokens, hidden=hidden, seed=seed)
    _add_parallel(model, paths, bottleneck, scale, seed)


def add_unipelt(
    model: "PreTrainedModel",
    tokens: int,
    rank: int,
    bottleneck: int,
    targets: Targets | None = None,
    *,
    seed: int = 0,
) -> None:
    """A prefix, LoRA (alpha = 2 rank) and adapters behind the feed-forward layers, each with gates.

    targets: of LoRA; None takes the defaults of the model's family
    Raises CourseError before anything is changed.
    """
    _check(model, bottleneck, seed)
    targets = surgery.default_targets(model) if targets is None else targets
    adapted = surgery.find_layers(model, targets)
    writers = surgery.find_layers(model, stream_writers(model)[-1:])
    lora.check_layers(model, adapted, rank, 1)
    if both := adapted.keys() & writers.keys():
        raise CourseError(f"{min(both)} gets an adapter: take it out of the targets of LoRA")
    prefix.add_prefix(model, tokens, seed=seed)
    gates = torch.zeros(len(prefix.attention_layers(model)))
    prefix.virtual_tokens(model).gates = nn.Parameter(gates.to(model.device))
    with prefix.seeded(seed):
        for path, layer in adapted.items():
            d_out, d_in = surgery.layer_shape(layer)
            update = lora.LowRank(d_in, d_out, rank, 2 * rank)
            _replace(model, path, BesideLinear(layer, update, d_in, reads_output=False, gated=True))
        for path, layer in writers.items():
            width, _ = surgery.layer_shape(layer)
            update = Bottleneck(width, bottleneck)
            _replace(model, path, BesideLinear(layer, update, width, reads_output=True, gated=True))


def add_ia3(
    model: nn.Module, targets: Targets | None = None, feedforward: Targets | None = None
) -> None:
    """Numbers that scale keys, values and the input of the last feed-forward layer.

    targets, feedforward: linear layers, and those of them whose input is scaled; None takes peft's
        for the model's family
    Raises CourseError before anything is changed.
    """
    _check(model)
    if targets is None and feedforward is not None:
        raise CourseError("feedforward without targets: give both, or neither for the defaults")
    known, inputs = _ia3_targets(model) if targets is None else (targets, feedforward or [])
    layers = surgery.find_layers(model, known)
    on_input = surgery.find_layers(model, inputs) if inputs else {}
    if not on_input.keys() <= layers.keys():
        found = min(on_input.keys() - layers.keys())
        raise CourseError(f"{found} is in feedforward and not in targets: add it to both")
    shared = surgery.shared_weights(model)
    for path, layer in layers.items():
        if id(layer.weight) in shared:
            found = "shares its weight with another layer, which a merge would change"
            raise CourseError(f"{path} {found}: take it out of targets")
    model.requires_grad_(False)
    for path, layer in layers.items():
        _replace(model, path, IA3Linear(layer, path in on_input))


def _ia3_targets(model: nn.Module) -> tuple[Targets, Targets]:
    from peft.utils import constants

    family = getattr(getattr(model, "config", None), "model_type", "")
    known = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    if family not in known:
        found = f"no IA3 targets are known for models of type {family!r}"
        raise CourseError(f"{found}: give targets and feedforward, names of linear layers")
    inputs = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    return known[family], inputs.get(family, [])


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """The normalisations, by name."""
    surgery.check_model(model)
    return {
        path: one
        for path, one in surgery.uncompiled(model).named_modules()
        if "Norm" in type(one).__name__
    }


def train_norms(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Train the weights and biases of the normalisations alone; None takes all of them. Raises
    CourseError for a name that none has.
    """
    known = norms(model)
    names = known if names is None else [names] if isinstance(names, str) else names
    if unknown := [name for name in names if name not in known]:
        found = f"{unknown[0]!r} is no normalisation of a {type(model).__name__}"
        raise CourseError(f"{found}: take names of adapters.norms(model)")
    _train(model, [known[name] for name in names])


def train_biases(model: nn.Module) -> None:
    """Train the biases alone. Where no linear layer has one, all but the head get some: zeros,
    which a file of the model would not keep.
    """
    _check(model)
    layers = surgery.linear_layers(model)
    if all(layer.bias is None for layer in layers.values()):
        for layer in surgery.find_layers(model, surgery.ALL_LINEAR).values():
            d_out, _ = surgery.layer_shape(layer)
            dtype = layer.weight.dtype if layer.weight.is_floating_point() else torch.float32
            layer.bias = nn.Parameter(torch.zeros(d_out, dtype=dtype, device=layer.weight.device))
            layer.had_no_bias = True
        surgery.refuse_save(surgery.uncompiled(model))
    _train(
        model, [one for one in model.modules() if getattr(one, "bias", None) is not None], "bias"
    )


def _train(model: nn.Module, modules: Sequence[nn.Module], *parts: str) -> None:
    """Let weights of the model itself train, and remember what they were."""
    _check(model)
    model = surgery.uncompiled(model)
    chosen = {
        id(weight)
        for module in modules
        for name, weight in module.named_parameters(recurse=False)
        if not parts or name in parts
    }
    if not chosen:
        found = f"a {type(model).__name__} has no such weights"
        raise CourseError(f"{found}: choose another method, such as LoRA")
    model.requires_grad_(False)
    originals = {}
    for name, weight in model.named_parameters():
        if id(weight) in chosen:
            weight.requires_grad_(True)
            originals[name] = weight.detach().clone()
    setattr(model, ORIGINALS, originals)


def originals_of(model: nn.Module) -> Mapping[str, Tensor]:
    """What the model's own weights were before `train_norms` or `train_biases`, by their names."""
    return getattr(surgery.uncompiled(model), ORIGINALS, {})


def beside(model: nn.Module) -> dict[str, Beside]:
    """The modules with something beside them, by name."""
    return {
        path: one
        for path, one in surgery.uncompiled(model).named_modules()
        if isinstance(one, Beside)
    }


def ia3_layers(model: nn.Module) -> dict[str, IA3Linear]:
    """The layers with scales, by name."""
    return {
        path: one
        for path, one in surgery.wrapped_layers(model).items()
        if isinstance(one, IA3Linear)
    }


def remove_adapters(model: nn.Module) -> None:
    """Take out whatever this module put in, and virtual tokens: the model is the base again, and
    all its weights can train. A model that has none stays as it is.
    """
    surgery.check_model(model)
    model = surgery.uncompiled(model)
    found = beside(model) | ia3_layers(model)
    for path in sorted(found, key=len, reverse=True):
        surgery.replace_layer(model, path, found[path].base)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, original in originals_of(model).items():
            weights[name].copy_(original)
    for layer in surgery.linear_layers(model).values():
        if vars(layer).pop("had_no_bias", False):
            layer.bias = None
    trained = vars(model).pop(ORIGINALS, {})
    prefix.remove_virtual_tokens(model)
    if found or trained:
        surgery.restore(model)


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    device = next(model.get_submodule(path).parameters()).device
    surgery.replace_layer(model, path, new.to(device))
    surgery.refuse_save(model)


def stream_writers(model: nn.Module) -> list[str]:
    """The names of the layers whose output is added to the stream of a block."""
    family = getattr(getattr(model, "config", None), "model_type", "")
    if family not in WRITERS:
        found = f"for models of type {family!r} it is not known which layers end attention and FFN"
        raise CourseError(f"{found}: give targets, names of linear layers")
    return WRITERS[family]


def feedforward_modules(model: nn.Module) -> list[str]:
    """The names of the feed-forward modules, one in each block."""
    surgery.check_model(model)
    blocks = memory.blocks_of(surgery.uncompiled(model))
    names = {id(module): path for path, module in surgery.uncompiled(model).named_modules()}
    found = [f"{names[id(block)]}.mlp" for block in blocks if hasattr(block, "mlp")]
    if not found or len(found) < len(blocks):
        raise CourseError(
            f"a {type(model).__name__} has no module called mlp in each block: take add_bottlenecks"
        )
    return found


def _check(model: nn.Module, bottleneck: int = 1, seed: int = 0, scale: float = 1.0) -> None:
    """Raise CourseError if the model can have no such adapter."""
    prefix.check_free(model, seed)
    if type(bottleneck) is not int or not 1 <= bottleneck <= prefix.WIDEST:
        found = f"bottleneck={bottleneck!r} must be a whole number in 1..{prefix.WIDEST}"
        raise CourseError(f"{found}, such as 64")
    if not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise CourseError(f"scale={scale!r} must be a finite number above 0, such as 4")


def log_probabilities(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Of each row the log-probability of each supervised token."""
    logits, tokens = supervised_logits(model, batch)
    found = -cross_entropy(logits, tokens, reduction="none")
    return [*found.split((batch["labels"][:, 1:] != IGNORED).sum(1).tolist())]


def choice_losses(choices: Sequence[Tensor], right: int) -> dict[str, Tensor]:
    """The three losses with which IA3 was trained (section 3.2), from the log-probabilities of the
    tokens of each answer one can choose; right: the place of the right one.

    LM: of the right answer, the mean over its tokens of -log p
    unlikelihood: of the tokens of all others, the mean of -log(1 - p)
    length-normalised: -log of the softmax, over the answers, of their mean log p

    Raises CourseError for fewer than two answers, one without tokens, or a place where none is.

    >>> half = torch.tensor([0.5]).log()
    >>> {name: round(loss.item(), 3) for name, loss in choice_losses([half, half], 0).items()}
    {'LM': 0.693, 'unlikelihood': 0.693, 'length-normalised': 0.693}
    """
    if len(choices) < 2 or not all(len(one) for one in choices):
        found = f"{len(choices)} answers of {[len(one) for one in choices]} tokens"
        raise CourseError(f"found {found}, expected two or more answers with tokens")
    if type(right) is not int or not 0 <= right < len(choices):
        raise CourseError(f"right={right!r} must be a whole number in 0..{len(choices) - 1}")
    others = torch.cat([one for place, one in enumerate(choices) if place != right])
    means = torch.stack([one.mean() for one in choices])
    return {
        "LM": -means[right],
        "unlikelihood": -torch.log1p(-others.clamp(max=SUREST).exp()).mean(),
        "length-normalised": -means.log_softmax(0)[right],
    }
