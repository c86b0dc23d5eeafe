"""AdaLoRA: an update in three factors, whose ranks move to the layers where they matter.

Paper: AdaLoRA, Zhang et al. 2023, arXiv 2303.10512, sections 3.1 to 3.3

    h = W0 x + (alpha / r) P diag(lambda) Q x,     P: (d_out, r),  lambda: (r,),  Q: (r, d_in)

Column i of P, lambda_i and row i of Q are a triplet. All layers start with r triplets; a budget of
triplets for the whole model falls from step to step, and those that matter least get lambda_i = 0.
`lambda` starts at zero, so a fresh adapter changes nothing; P and Q start random, and a penalty
makes them orthogonal, so that a triplet is a direction and can go without the others.

Three things are as in the authors' code and in peft, and not as printed: the scale is alpha / r
with the r of the start, also where fewer triplets are left (peft adds 1e-5 to r); the penalty is
the mean of the norms over all P and Q, not a sum of their squares; the schedule of the budget does
not have the misprint of equation (14).

    add_adalora(base.model, rank=8, alpha=16)
    budget = Budget(base.model, target_rank=4, steps=150, initial_steps=15, final_steps=50)
    finetune(base, ..., steps=150, loss=penalized_loss, after_step=budget)
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import linear

from course_lib import surgery
from course_lib.lora import check_addition, check_layers, check_size
from course_lib.objective import Batch, supervised_logits
from course_lib.runtime import CourseError
from course_lib.surgery import LinearWrapper, Targets, layer_shape

START_STD = 0.02  # of the entries of P and Q
BETA = 0.85  # of both averages; the paper's beta_1 and beta_2
PENALTY_WEIGHT = 0.5  # peft's; the paper's gamma, tried at 0.1, 0.3 and 0.5


class SVDLinear(LinearWrapper):
    """The linear layer `base`, frozen, plus (alpha / rank) P diag(singular) Q.

    P, Q: normal with standard deviation 0.02; singular: zero. All are float32 and train.
    pruned: (rank,), the triplets that the last pruning set to zero

    >>> layer = SVDLinear(nn.Linear(8, 4), rank=2, alpha=4)
    >>> x = torch.ones(3, 8)
    >>> torch.equal(layer(x), layer.base(x))  # the singular values are zero at the start
    True
    """

    def __init__(
        self, base: nn.Module, rank: int, alpha: float, *, generator: Generator | None = None
    ):
        super().__init__()
        check_size(rank, alpha, base)
        d_out, d_in = layer_shape(base)
        self.base = base.requires_grad_(False)
        self.rank, self.alpha = rank, alpha
        self.P = nn.Parameter(torch.empty(d_out, rank, dtype=torch.float32))
        self.singular = nn.Parameter(torch.zeros(rank, dtype=torch.float32))
        self.Q = nn.Parameter(torch.empty(rank, d_in, dtype=torch.float32))
        for factor in (self.P, self.Q):
            nn.init.normal_(factor, std=START_STD, generator=generator)
        self.register_buffer("pruned", torch.zeros(rank, dtype=torch.bool))
        self.to(base.weight.device)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def live(self) -> Tensor:
        """(rank,) bool: the triplets that the layer has; between two prunings one can come back."""
        return ~self.pruned | (self.singular != 0)

    def identity(self) -> float:
        """What tells a run with it from another, beside weights."""
        return self.scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out). Scales where a position has only r numbers."""
        h = self.base(x)
        directions = linear(x.to(self.Q.dtype), self.Q) * (self.scale * self.singular)
        return (h + linear(directions, self.P)).to(h.dtype)

    def delta(self) -> Tensor:
        """What is added to the weight, (d_out, d_in)."""
        return self.scale * (self.P * self.singular) @ self.Q


def orthogonality_penalty(layers: Iterable[SVDLinear]) -> Tensor:
    """The mean of |P^T P - I| and |Q Q^T - I|, Frobenius norms, over the layers: 0 if all columns
    of P and rows of Q are orthogonal and of length 1.

    layers: of one rank

    >>> layer = SVDLinear(nn.Linear(2, 2), rank=2, alpha=1)
    >>> layer.P.data, layer.Q.data = torch.eye(2), 2 * torch.eye(2)  # |Q Q^T - I| = |3 I|
    >>> print(f"{orthogonality_penalty([layer]).item():.4f}")  # (0 + sqrt(18)) / 2
    2.1213
    """
    grams = torch.stack(
        [gram for layer in layers for gram in (layer.P.T @ layer.P, layer.Q @ layer.Q.T)]
    )  # (2 layers, rank, rank)
    identity = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
    return (grams - identity).flatten(1).norm(dim=1).mean()


def penalized_loss(model: nn.Module, batch: Batch, weight: float = PENALTY_WEIGHT) -> Tensor:
    """`objective.summed_loss` plus `weight` times the penalty, once a supervised token: what
    `finetune` takes as `loss`, and divides by the number of tokens.

    For another weight: functools.partial(penalized_loss, weight=0.1).
    """
    logits, right = supervised_logits(model, batch)
    loss = nn.functional.cross_entropy(logits, right, reduction="sum")
    return loss + weight * len(right) * orthogonality_penalty(adalora_layers(model).values())


def update_importance(
    sensitivity: Tensor, uncertainty: Tensor, weight: Tensor, gradient: Tensor
) -> None:
    """Take one step into the two moving averages, in place. All tensors have one shape.

        I = |w dL/dw|        what the loss would change by, to first order, if w were zero
        sensitivity          average of I
        uncertainty          average of |I - sensitivity|

    An element's score is sensitivity * uncertainty.

    >>> s, u = torch.zeros(2), torch.zeros(2)
    >>> update_importance(s, u, weight=torch.tensor([2.0, 0.5]), gradient=torch.tensor([-1.0, 2.0]))
    >>> s, u
    (tensor([0.3000, 0.1500]), tensor([0.2550, 0.1275]))
    """
    importance = (weight * gradient).abs_()
    sensitivity.lerp_(importance, 1 - BETA)
    uncertainty.lerp_(importance.sub_(sensitivity).abs_(), 1 - BETA)


def triplet_scores(P: Tensor, singular: Tensor, Q: Tensor) -> Tensor:
    """(rank,) from the scores of the elements, shaped as P, singular and Q: a triplet has that of
    its singular value, plus the mean of its column of P, plus the mean of its row of Q.
    """
    return singular + P.mean(0) + Q.mean(1)


def keep_top(scores: Tensor, budget: int) -> Tensor:
    """The `budget` highest of all scores, of whatever layer: True where they are.

    scores: (layers, rank)

    >>> keep_top(torch.tensor([[0.9, 0.1], [0.5, 0.7]]), budget=2).tolist()
    [[True, False], [False, True]]
    """
    kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[scores.flatten().topk(budget).indices] = True
    return kept.view_as(scores)


@dataclass(frozen=True)
class Schedule:
    """How many triplets the model may have after each step: `start`, then less and less, a cubic
    curve, then `target`.

    start, target: triplets in all layers together
    initial_steps, final_steps: before the first pruning and after the last (t_i and t_f)
    every: steps from one pruning to the next (Delta T)

    The case of the paper's DeBERTa, 72 matrices, average rank from 12 to 8:

    >>> schedule = Schedule(864, 576, steps=1000, initial_steps=100, final_steps=300, every=1)
    >>> [schedule.budget(step) for step in (100, 150, 200, 300, 400, 500, 600, 700)]
    [864, 797, 742, 661, 612, 586, 577, 576]

    The paper's equation (14) has t - t_i - t_f for t - t_i. So the budget would begin above the
    start, and end above the target:

    >>> [int(576 + 288 * (1 - (step - 100 - 300) / 600) ** 3) for step in (100, 700)]
    [1548, 612]

    Raises CourseError for numbers that leave no step between the two phases.
    """

    start: int
    target: int
    steps: int
    initial_steps: int
    final_steps: int
    every: int

    def __post_init__(self) -> None:
        for name, least in {"steps": 1, "initial_steps": 0, "final_steps": 0, "every": 1}.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                advice = "; give the steps that finetune gets" if name == "steps" else ""
                expected = f"must be a whole number of optimizer steps, at least {least}"
                raise CourseError(f"{name}={value!r} {expected}{advice}")
        if self.initial_steps >= self.last_pruning:
            found = f"initial_steps={self.initial_steps} and final_steps={self.final_steps} leave"
            advice = "lower one of them, or raise steps"
            raise CourseError(f"{found} no step of {self.steps} to prune in: {advice}")

    @property
    def last_pruning(self) -> int:
        """The step that reaches the target; from it on the choice stays."""
        return self.steps - self.final_steps

    def budget(self, step: int) -> int:
        """After step `step`, counted from 1."""
        span = self.last_pruning - self.initial_steps
        done = min(max(step - self.initial_steps, 0) / span, 1)
        return int(self.target + (self.start - self.target) * (1 - done) ** 3)

    def prunes(self, step: int) -> bool:
        """Is there a pruning before the last one after this step?"""
        return self.initial_steps < step < self.last_pruning and step % self.every == 0


class Budget:
    """Prunes the adapter of `model` from its rank to `target_rank` on average: what `finetune`
    takes as `after_step`. Its state is kept in checkpoints.

    target_rank: triplets a layer on average at the end, 0.5 for one in every second layer; the
        paper starts with 1.5 times as many
    steps, initial_steps, final_steps, every: as in `Schedule`; steps are those that finetune gets
    history: the ranks of the layers after each step of this session
    """

    def __init__(
        self,
        model: nn.Module,
        target_rank: float,
        *,
        steps: int,
        initial_steps: int,
        final_steps: int,
        every: int = 1,
    ):
        self.layers = _layers_to_prune(model, target_rank)
        ranks = [layer.rank for layer in self.layers.values()]
        target = round(target_rank * len(ranks))
        self.schedule = Schedule(sum(ranks), target, steps, initial_steps, final_steps, every)
        self.history: list[list[int]] = []
        self._weights = {
            f"{path}.{name}": getattr(layer, name)
            for path, layer in self.layers.items()
            for name in ("P", "singular", "Q")
        }
        self._begin()

    def __call__(self, model: nn.Module, step: int) -> None:
        """After the optimizer's step, with the gradients still there."""
        if step <= self.last_step:
            self._begin()  # another run
        self.last_step = step
        if not self.is_final and (step < self.schedule.last_pruning or not self.sensitivity):
            self._watch()
        if self.schedule.prunes(step):
            self._prune(self.schedule.budget(step))
        elif step >= self.schedule.last_pruning:
            if not self.is_final:
                self._prune(self.schedule.target)
                self.is_final, self.sensitivity, self.uncertainty = True, {}, {}
            self._mask()
        self.history.append(list(self.ranks.values()))

    @property
    def ranks(self) -> dict[str, int]:
        """Of each layer, the triplets it has now."""
        numbers = torch.stack([layer.live for layer in self.layers.values()]).sum(1).tolist()
        return dict(zip(self.layers, numbers, strict=True))

    def scores(self) -> Tensor:
        """(layers, rank): how much each triplet matters, sensitivity times uncertainty."""
        return self.triplets(
            {name: self.sensitivity[name] * self.uncertainty[name] for name in self._weights}
        )

    def triplets(self, elements: Mapping[str, Tensor]) -> Tensor:
        """(layers, rank) from scores of all elements, by the names of the weights."""
        parts = (
            [elements[f"{path}.{name}"] for name in ("P", "singular", "Q")] for path in self.layers
        )
        return torch.stack([triplet_scores(*part) for part in parts])

    def state_dict(self) -> dict[str, Tensor]:
        averages = {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}
        pruned = torch.stack([layer.pruned for layer in self.layers.values()])
        return {
            "last step": torch.tensor(self.last_step),
            "is final": torch.tensor(self.is_final),
            "pruned": pruned,
            **{
                f"{kind} of {name}": value
                for kind, values in averages.items()
                for name, value in values.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.last_step, self.is_final = state["last step"].item(), state["is final"].item()
        for layer, pruned in zip(self.layers.values(), state["pruned"], strict=True):
            layer.pruned.copy_(pruned)
        self.sensitivity, self.uncertainty = (
            {
                name: state[f"{kind} of {name}"].to(weight.device)
                for name, weight in self._weights.items()
                if f"{kind} of {name}" in state
            }
            for kind in ("sensitivity", "uncertainty")
        )

    def check(self, model: nn.Module, steps: int) -> None:
        """Raise CourseError, before the first step of a run, if the budget is not of that run."""
        if steps != self.schedule.steps:
            found = f"the budget is made for steps={self.schedule.steps}, the run has {steps}"
            raise CourseError(f"{found}: give both the same")
        layers = adalora_layers(model)
        if [*layers.values()] != [*self.layers.values()]:
            found = f"the budget is of {len(self.layers)} layers that are not those of this model"
            raise CourseError(f"{found}: make it from the model that is trained")
        if frozen := [name for name, one in self._weights.items() if not one.requires_grad]:
            found = f"{frozen[0]} is frozen, and its importance is read from its gradient"
            raise CourseError(f"{found}: call requires_grad_(True) on it")

    def __repr__(self) -> str:
        """Also tells a checkpoint's run from one with another schedule."""
        return f"{type(self).__name__}({self.schedule})"

    def _begin(self) -> None:
        self.last_step, self.is_final = 0, False
        self.sensitivity: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}
        for layer in self.layers.values():
            layer.pruned.fill_(False)

    @torch.no_grad()
    def _watch(self) -> None:
        for name, weight in self._weights.items():
            if name not in self.sensitivity:  # made here, since the model may have moved
                self.sensitivity[name] = torch.zeros_like(weight)
                self.uncertainty[name] = torch.zeros_like(weight)
            update_importance(self.sensitivity[name], self.uncertainty[name], weight, weight.grad)

    def _prune(self, budget: int) -> None:
        kept = keep_top(self.scores(), budget)
        for layer, mask in zip(self.layers.values(), kept, strict=True):
            layer.pruned.copy_(~mask)
        self._mask()

    @torch.no_grad()
    def _mask(self) -> None:
        for layer in self.layers.values():
            layer.singular.masked_fill_(layer.pruned, 0)


def add_adalora(
    model: nn.Module, rank: int, alpha: float, targets: Targets | None = None, *, seed: int = 0
) -> None:
    """Give `model` an adapter; all other weights freeze.

    rank: of every layer at the start
    targets: as in `surgery.find_layers`; None takes the `surgery.default_targets` of the family
    seed: of P and Q, from 0 to 2**64 - 1
    Raises CourseError before anything is changed.
    """
    check_addition(model, seed)
    if surgery.wrapped_layers(model):
        raise CourseError("the model has an adapter already: load the base again")
    targets = surgery.default_targets(model) if targets is None else targets
    layers = surgery.find_layers(model, targets)
    check_layers(model, layers, rank, alpha)
    model.requires_grad_(False)
    generator = Generator().manual_seed(seed)
    for path, layer in layers.items():
        surgery.replace_layer(model, path, SVDLinear(layer, rank, alpha, generator=generator))


def remove_adalora(model: nn.Module) -> None:
    """Take the adapter out: the model is the base again, and all its weights can train. One that
    has none stays as it is.
    """
    layers = adalora_layers(model)
    for path, layer in layers.items():
        surgery.replace_layer(model, path, layer.base)
    if layers:
        surgery.restore(model)


def adalora_layers(model: nn.Module) -> dict[str, SVDLinear]:
    """The layers with an update in three factors, by their names in the model."""
    return {
        path: layer
        for path, layer in surgery.wrapped_layers(model).items()
        if isinstance(layer, SVDLinear)
    }


def check_seam(model: nn.Module, after_step: object, steps: int) -> None:
    """Raise CourseError, before the first step of a run, if ranks would stay as they are and nobody
    would say so: of an adapter of ours that has no Budget, or of peft's that nothing calls.
    """
    if isinstance(after_step, Budget):
        after_step.check(model, steps)
    elif any(layer.singular.requires_grad for layer in adalora_layers(model).values()):
        found = "AdaLoRA without a budget keeps all its ranks"
        raise CourseError(f"{found}: give after_step=Budget(model, target_rank=..., steps={steps})")
    elif after_step is None and any(
        hasattr(module, "update_and_allocate") for module in model.modules()
    ):
        found = "peft's AdaLoRA keeps all its ranks unless it is called after each step"
        advice = "after_step=lambda model, step: model.base_model.update_and_allocate(step)"
        raise CourseError(f"{found}: give {advice}")


def _layers_to_prune(model: nn.Module, target_rank: float) -> dict[str, SVDLinear]:
    """The layers. Raises CourseError if there are none, or the target is not one for them."""
    layers = adalora_layers(model)
    if not layers:
        raise CourseError("the model has no layers of AdaLoRA: add_adalora adds them")
    rank = min(layer.rank for layer in layers.values())
    if type(target_rank) not in (int, float) or not 1 <= target_rank * len(layers) <= rank * len(
        layers
    ):
        found = f"target_rank={target_rank!r} must be a number in {1 / len(layers):.2g}..{rank}"
        advice = "lower it, or give add_adalora a higher rank, such as 1.5 times the target"
        raise CourseError(f"{found}, one triplet in all and the rank at the start: {advice}")
    return layers
