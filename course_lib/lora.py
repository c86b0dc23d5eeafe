"""LoRA: a frozen linear layer plus a trainable low-rank update.

Paper: LoRA, Hu et al. 2021, arXiv 2106.09685, section 4.1, equation (3)

    h = W0 x + (alpha / r) B A x,      A: (r, d_in),  B: (d_out, r)

`A` starts random and `B` starts at zero, so a fresh adapter changes nothing. With `rank_stabilized`
the factor is alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732). There is no dropout; peft's
default is 0, too.

A layer holds any number of updates, each under a name, and one forward serves all their uses: one
of them, none (the base model), a blend, or in one batch each on the rows of its own job
(`fused_rows`). The updates of one name in all layers are an adapter. Training several at once is in
`fusion`, adapters as files in `adapter_files`.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import linear

from course_lib import surgery
from course_lib.runtime import CourseError
from course_lib.surgery import LinearWrapper, Targets, layer_shape, weight_matrix


class LowRank(nn.Module):
    """The update (alpha / r) B A of one layer.

    A is uniform within 1 / sqrt(d_in), B is zero; both are float32 and train.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        alpha: float,
        rank_stabilized: bool = False,
        generator: Generator | None = None,
    ):
        super().__init__()
        self.rank, self.alpha, self.rank_stabilized = rank, alpha, rank_stabilized
        self.A = nn.Parameter(torch.empty(rank, d_in, dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(d_out, rank, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def forward(self, x: Tensor, weight: float = 1.0) -> Tensor:
        """(..., d_in) -> (..., d_out).

        Never forms the d_out x d_in product, and scales where a position has only r numbers.
        """
        return linear(linear(x.to(self.A.dtype), self.A) * (weight * self.scale), self.B)


class LoRALinear(LinearWrapper):
    """The linear layer `base`, frozen, plus updates.

    adapters: the updates by name, at first the one that the layer is made with
    in_use: name -> weight of the updates that are added, at first the same one
    rows: None; or, for a fused batch, name -> how many rows are its own, in the order of the batch

    >>> layer = LoRALinear(nn.Linear(8, 4), rank=2, alpha=4)
    >>> x = torch.ones(3, 8)
    >>> torch.equal(layer(x), layer.base(x))  # B is zero at the start
    True
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        *,
        name: str = "default",
        rank_stabilized: bool = False,
        generator: Generator | None = None,
    ):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.rows: dict[str, int] | None = None
        self.add(rank, alpha, name=name, rank_stabilized=rank_stabilized, generator=generator)
        base.requires_grad_(False)

    def add(
        self,
        rank: int,
        alpha: float,
        *,
        name: str,
        rank_stabilized: bool = False,
        generator: Generator | None = None,
    ) -> None:
        """Another update, which is then the one in use. generator: for A, on the CPU; torch's
        global one if None.
        """
        check_size(rank, alpha, self.base)
        d_out, d_in = layer_shape(self.base)
        update = LowRank(d_in, d_out, rank, alpha, rank_stabilized, generator)
        self.adapters[name] = update.to(self.base.weight.device)
        self.in_use = {name: 1.0}

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out).

        Of a fused batch, (N, T, d_in), the base takes all rows at once, each update its own.
        """
        h = self.base(x)
        if self.rows is not None:
            return self._fused(x, h)
        for name, weight in self.in_use.items():
            h = (h + self.adapters[name](x, weight)).to(h.dtype)
        return h

    def _fused(self, x: Tensor, h: Tensor) -> Tensor:
        sizes = list(self.rows.values())
        if x.dim() < 3 or len(x) != sum(sizes):
            found = f"a layer got {len(x)} rows of a batch of {sum(sizes)}"
            raise CourseError(
                f"{found}: give each row of the batch to a job; if the model mixes rows, train its "
                "jobs apart"
            )
        parts = zip(self.rows, x.split(sizes), h.split(sizes), strict=True)
        return torch.cat(
            [
                (h + self.adapters[name](x)).to(h.dtype) if name in self.adapters else h
                for name, x, h in parts
            ]
        )

    def identity(self) -> dict[str, float]:
        """What tells a run with it from another, beside weights: of the updates in use."""
        return {name: weight * self.adapters[name].scale for name, weight in self.in_use.items()}

    def delta(self) -> Tensor:
        """What the updates in use add to the weight, (d_out, d_in): the sum of weight (alpha / r) B
        A.
        """
        total = torch.zeros(layer_shape(self.base), device=self.base.weight.device)
        for name, weight in self.in_use.items():
            update = self.adapters[name]
            total = total + weight * update.scale * update.B @ update.A
        return total


def check_size(rank: int, alpha: float, layer: nn.Module, name: str = "") -> None:
    """Raise CourseError if `layer`, called `name`, can have no update of this rank and alpha."""
    d_out, d_in = layer_shape(layer)
    most = min(d_out, d_in)
    if type(rank) is not int or not 1 <= rank <= most:
        where = f"{name}, a {d_out} x {d_in} weight" if name else f"a {d_out} x {d_in} weight"
        raise CourseError(
            f"rank={rank!r} must be a whole number in 1..{most} for {where}: choose one, or leave "
            "the layer out"
        )
    if not isinstance(alpha, int | float) or not 0 < alpha <= torch.finfo(torch.float32).max:
        raise CourseError(f"alpha={alpha!r} must be a finite number above 0: try twice the rank")


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    targets: Targets | None = None,
    *,
    name: str = "default",
    rank_stabilized: bool = False,
    seed: int = 0,
) -> None:
    """Give `model` an adapter, which is then the one in use.

    With the first one, all other weights freeze.

    targets: as in `surgery.find_layers`; None takes the `surgery.default_targets` of the model's
        family
    seed: of the matrices A, from 0 to 2**64 - 1
    Raises CourseError before anything is changed.
    """
    check_addition(model, seed, name)
    targets = surgery.default_targets(model) if targets is None else targets
    layers = surgery.find_layers(model, targets)
    check_layers(model, layers, rank, alpha)
    if not lora_layers(model):
        model.requires_grad_(False)
    generator = Generator().manual_seed(seed)
    for path, layer in layers.items():
        if isinstance(layer, LoRALinear):
            layer.add(rank, alpha, name=name, rank_stabilized=rank_stabilized, generator=generator)
        else:
            wrapper = LoRALinear(
                layer, rank, alpha, name=name, rank_stabilized=rank_stabilized, generator=generator
            )
            surgery.replace_layer(model, path, wrapper)
    use_adapters(model, name)


def check_addition(model: nn.Module, seed: int, name: str = "default") -> None:
    """Raise CourseError if the model can have no adapter of this name and seed."""
    surgery.check_model(model)
    if hasattr(model, "peft_config"):
        advice = "load the base again, then add_lora, or load_adapter for a saved one"
        raise CourseError(f"the model has an adapter of peft: {advice}")
    surgery.check_no_additions(model)
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        advice = "choose another word, without dots"
        raise CourseError(f"an adapter cannot be called {name!r}: {advice}")
    if name in adapter_names(model):
        advice = "choose another name, or load the base again"
        raise CourseError(f"the model has an adapter {name!r} already: {advice}")
    if type(seed) is not int or not 0 <= seed < 2**64:
        expected = f"must be a whole number from 0 to {2**64 - 1}: choose one, such as 0"
        raise CourseError(f"seed={seed!r} {expected}")


def check_layers(
    model: nn.Module, layers: Mapping[str, nn.Module], rank: int, alpha: float
) -> None:
    """Raise CourseError if one of these layers of the model can have no update of this size."""
    shared = surgery.shared_weights(model)
    for path, layer in layers.items():
        if isinstance(layer, LinearWrapper) and not isinstance(layer, LoRALinear):
            advice = "load the base again, or take it out of targets"
            raise CourseError(f"{path} is a {type(layer).__name__} already: {advice}")
        if id(getattr(layer, "weight", None)) in shared:
            found = "shares its weight with another layer, as a head with the embeddings"
            advice = "which a merge would change: take it out of targets"
            raise CourseError(f"{path} {found}, {advice}")
        check_size(rank, alpha, layer, path)


def lora_layers(model: nn.Module, name: str | None = None) -> dict[str, LoRALinear]:
    """The layers with updates, by their names in the model; only those of the adapter `name`, if it
    is given.

    Raises CourseError for a name that no adapter has, and lists those there are.
    """
    layers = {
        path: module
        for path, module in surgery.uncompiled(model).named_modules()
        if isinstance(module, LoRALinear)
    }
    if name is None:
        return layers
    found = {path: layer for path, layer in layers.items() if name in layer.adapters}
    if not found:
        known = ", ".join(adapter_names(model)) or "none: add_lora adds one"
        raise CourseError(f"adapter {name!r} is not known, the model has {known}")
    return found


def remove_lora(model: nn.Module, name: str | None = None) -> None:
    """Take the adapter `name` out of the model, or all adapters if none is named; of those that
    stay the last one is then in use.

    Without adapters the model is the base again: its layers are those of before, and all its
    weights can train, those of a quantised base excepted. A model that has none stays as it is, so
    that a cell which removes and adds can run twice.

    Raises CourseError where weights beside the matrices train: they would stay changed.
    """
    layers = lora_layers(model, name)
    leaving = {name} if name else set(adapter_names(model))
    if layers and leaving == set(adapter_names(model)) and (beside := trained_beside(model)):
        found = f"{beside[0]} trains beside the adapter, so the base would not come back"
        raise CourseError(f"{found}: load the base again")
    for path, layer in layers.items():
        for gone in [name] if name else list(layer.adapters):
            del layer.adapters[gone]
        if not layer.adapters:
            surgery.replace_layer(model, path, layer.base)
    if names := adapter_names(model):
        use_adapters(model, names[-1])
    elif layers:
        surgery.restore(model)


def trained_beside(model: nn.Module) -> list[str]:
    """The names of the weights that train and are of no adapter."""
    updates = {
        id(weight)
        for layer in lora_layers(model).values()
        for weight in layer.adapters.parameters()
    }
    return [
        name
        for name, weight in surgery.uncompiled(model).named_parameters()
        if weight.requires_grad and id(weight) not in updates
    ]


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters."""
    return list(
        dict.fromkeys(name for layer in lora_layers(model).values() for name in layer.adapters)
    )


def use_adapters(model: nn.Module, choice: str | Mapping[str, float]) -> None:
    """Choose what is added to the base: one adapter by name, several with weights {"a": 0.3, "b":
    0.7}, or {}, nothing.

    A blend is exact: the weighted sum of the updates. What is not in use does not train. Raises
    CourseError for an unknown name, a weight that is not finite, or a blend of adapters of
    different layers, where some layers would get a part of it only.
    """
    if not isinstance(choice, str | Mapping):
        raise CourseError(
            f'found {choice!r}, expected a name, weights such as {{"a": 0.3, "b": 0.7}}, or {{}} '
            "for nothing"
        )
    weights = {choice: 1.0} if isinstance(choice, str) else dict(choice)
    paths = {name: lora_layers(model, name).keys() for name in weights}
    for name, weight in weights.items():
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise CourseError(
                f"the weight of adapter {name!r} is {weight!r}, expected a finite number such as "
                "0.5"
            )
        first = next(iter(weights))
        if paths[name] != paths[first]:
            raise CourseError(
                f"adapters {first!r} and {name!r} change different layers: blend adapters made "
                "with the same targets"
            )
    for layer in lora_layers(model).values():
        before = layer.in_use
        layer.in_use = {name: weight for name, weight in weights.items() if name in layer.adapters}
        for name, update in layer.adapters.items():
            if (name in layer.in_use) != (name in before) or name not in layer.in_use:
                update.requires_grad_(name in layer.in_use)


@contextmanager
def fused_rows(model: nn.Module, rows: Mapping[str, int]) -> Iterator[None]:
    """In the block, each batch holds the rows of several adapters, one after the other; rows: name
    -> how many are its own. All of them train, until `use_adapters` chooses again.

    Raises CourseError for an unknown name, a number that is none, and for a model that trains with
    checkpointed activations: they would be computed again after the block, with the adapter that is
    in use then.
    """
    for name, number in rows.items():
        lora_layers(model, name)
        if type(number) is not int or number < 0:
            raise CourseError(
                f"adapter {name!r} has {number!r} rows, expected a whole number: count its rows of "
                "the batch"
            )
    if model.training and any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    ):
        raise CourseError(
            "fused batches need activations that are not checkpointed: call "
            "memory.checkpoint_blocks(model, 0)"
        )
    before = {layer: layer.rows for layer in lora_layers(model).values()}
    for layer in before:
        layer.rows = dict(rows)
        for name in rows.keys() & layer.adapters.keys():
            layer.adapters[name].requires_grad_(True)
    try:
        yield
    finally:
        for layer in before:
            layer.rows = before[layer]


def merged_copy(model: nn.Module) -> nn.Module:
    """A copy without wrapped layers that computes the same: the updates in use, of LoRA or another
    method that offers `delta`, and perhaps `bias_delta`, are in its weights.

    All of these can train.

    Raises CourseError for a model without such layers, for one with parts that no weight can hold,
    for quantised ones, and where a sum is not finite: an update can be too large for float16.
    """
    surgery.check_model(model)
    _check_mergeable(model)
    layers = surgery.wrapped_layers(model)
    for layer in layers.values():
        weight_matrix(layer.base)  # refuses quantised layers before the copy takes its memory
    merged = copy.deepcopy(surgery.uncompiled(model))
    with torch.no_grad():
        for path in layers:
            layer = merged.get_submodule(path)
            matrix = weight_matrix(layer.base)
            on_bias = layer.bias_delta() if hasattr(layer, "bias_delta") else None
            sums = [matrix.add_(layer.delta())]
            if on_bias is not None:
                sums.append(layer.base.bias.add_(on_bias))
            if not all(one.isfinite().all() for one in sums):
                found = f"{path} does not fit into {matrix.dtype} with its update"
                advice = "load the base with dtype=torch.float32, or train the adapter again"
                raise CourseError(f"{found}, or one of them is not finite: {advice}")
            surgery.replace_layer(merged, path, layer.base)
    surgery.restore(merged)
    return merged


def _check_mergeable(model: nn.Module) -> None:
    """Raise CourseError if the model has nothing to merge, or what no weight can hold."""
    layers = surgery.wrapped_layers(model)
    for path, module in surgery.uncompiled(model).named_modules():
        added = isinstance(module, LinearWrapper | surgery.Addition)
        if added and not hasattr(module, "delta"):
            found = f"{path} is a {type(module).__name__}"
            raise CourseError(f"{found}, which no weight can hold: keep the model as it is")
    if not layers:
        raise CourseError(
            "the model has no LoRA layers, so there is nothing to merge: add_lora adds them"
        )


class DoRALinear(LinearWrapper):
    """DoRA: low rank turns the rows of the weight, and a number each sets their lengths.

    Put in place by `surgery.replace_layer`.

    Paper: Liu et al. 2024, arXiv 2402.09353, equation (5), with |V| the lengths of the rows, held
    constant in the gradient

        h = (m / |V|) V x,      V = W0 + (alpha / r) B A,      m: (d_out,), |W0| at the start
    """

    def __init__(
        self, base: nn.Module, rank: int, alpha: float, *, generator: Generator | None = None
    ):
        super().__init__()
        check_size(rank, alpha, base)
        d_out, d_in = layer_shape(base)
        self.base = base.requires_grad_(False)
        self.update = LowRank(d_in, d_out, rank, alpha, generator=generator).to(base.weight.device)
        self.m = nn.Parameter(weight_matrix(base).float().norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out). Forms V, which costs time that LoRA saves."""
        V = weight_matrix(self.base) + self.update.scale * self.update.B @ self.update.A
        return linear(
            x, ((self.m / V.norm(dim=1).detach())[:, None] * V).to(x.dtype), self.base.bias
        )
