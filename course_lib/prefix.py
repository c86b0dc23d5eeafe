"""Virtual tokens: vectors that stand before the text and are trained, while the model stays frozen.

    prompt tuning     P vectors before the embeddings        Lester et al. 2021, arXiv 2104.08691
    P-tuning          the same, made by an MLP or an LSTM    Liu et al. 2021, arXiv 2103.10385
    prefix tuning     P keys and values in every layer,      Li and Liang 2021, arXiv 2101.00190,
                      made by an MLP that is thrown away     equation (3)
    P-tuning v2       the same without the MLP               Liu et al. 2021, arXiv 2110.07602

    attention of a layer:     softmax(q [K_P; K]^T / sqrt(d)) [V_P; V]

The keys and values of a prefix are those that a prompt of P tokens would have left in the KV cache.
So `states_of` a text is a prefix, and a prefix is a prompt whose inside can be trained.

The parameters have the layout of peft, and its starts: normal numbers, or zeros.
Two things differ. A prefix enters in the attention function, and not as a cache, which transformers
takes away under activation checkpointing; so checkpointing and packed rows are right, too. And
positions are counted from the mask, so that a row padded on the left computes what it does alone.
Where attention has a sliding window, a prefix stays in it, which a text in front would not; a soft
prompt leaves it like a text, and sooner in a row that is padded on the left.

Letters: P virtual tokens, T tokens of text, L layers, H heads of keys, d their width, C = H d; of
vectors before the embeddings C is the width of the model.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

from course_lib import memory, surgery
from course_lib.batching import IGNORED, check_ids, most_positions
from course_lib.runtime import CourseError, first_line, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "prefix"  # of the attention function
LSTM_LAYERS = 2  # as in peft
WIDEST = 2**16  # a network, or a bottleneck


class VirtualTokens(surgery.Addition):
    """What makes the vectors of P virtual tokens: a table, and perhaps a network behind it, which
    helps to train and is thrown away afterwards (`fold`).

    table: (P, what the network takes), or (P, what is needed) without a network
    """

    kind = "virtual tokens"

    def __init__(self, table: Tensor, network: nn.Sequential | None = None):
        super().__init__()
        self.table = nn.Parameter(table)
        self.network = network

    @property
    def count(self) -> int:
        """P"""
        return len(self.table)

    def vectors(self) -> Tensor:
        """(P, width)"""
        return self.table if self.network is None else self.network(self.table)

    def enter(self, model: "PreTrainedModel", unnamed: tuple, named: dict) -> tuple[tuple, dict]:
        """Hook before the model's forward pass: what it is given -> what it gets."""
        names = inspect.signature(model.forward).parameters
        named = dict(zip(names, unnamed, strict=False)) | named
        return (), self.prepared(model, named)

    def prepared(self, model: "PreTrainedModel", named: dict) -> dict:
        raise NotImplementedError

    def leave(self, model: "PreTrainedModel", unnamed: tuple, named: dict, output: Any) -> Any:
        """Hook after it."""
        raise NotImplementedError

    def positions(
        self, model: "PreTrainedModel", named: Mapping, past: int, shape: tuple[int, int]
    ) -> Tensor:
        """(N, T): positions of the text, which begins at P; padding on the left does not count.

        past: tokens of text in the cache; shape: (N, T)
        """
        tokens, mask, given = shape[1], named.get("attention_mask"), named.get("position_ids")
        if past + tokens > (most := most_positions(model)):
            found = f"{past + tokens} tokens behind {self.count} virtual ones"
            raise CourseError(f"{found}, where the model has room for {most}: shorten the text")
        if given is None and mask is not None and mask.dim() == 2:
            given = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens:]
        if given is None:
            given = torch.arange(past, past + tokens, device=model.device).expand(shape)
        return given + self.count


class Prefix(VirtualTokens):
    """Prefix tuning, or without a network P-tuning v2. The vectors are (P, 2 L C): of each layer
    its keys, then its values, as in peft.

    gates: (L,), a number each layer's keys and values are multiplied with, sigmoid(gate) (UniPELT);
        a closed gate leaves zeros, which still take a part of the attention
    config: the entries of the model's config that it changed, as they were
    """

    def __init__(self, table: Tensor, network: nn.Sequential | None, heads: int, width: int):
        super().__init__(table, network)
        self.heads, self.width = heads, width
        self.gates: nn.Parameter | None = None
        self.config: dict[str, Any] = {}
        self.calls = 0

    def states(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, (H, P, d) each."""
        size = 2 * self.heads * self.width
        rows = slice(layer * size, (layer + 1) * size)
        if self.network is None:
            flat = self.table[:, rows]
        else:  # of the last matrix the rows of this layer
            last = self.network[-1]
            hidden = self.network[:-1](self.table)
            flat = nn.functional.linear(hidden, last.weight[rows], last.bias[rows])
        if self.gates is not None:
            flat = flat * self.gates[layer].sigmoid()
        keys, values = flat.view(self.count, 2, self.heads, self.width).permute(1, 2, 0, 3)
        return keys, values

    def prepared(self, model: "PreTrainedModel", named: dict) -> dict:
        text = _text(named)
        self.calls = 0
        return named | {"position_ids": self.positions(model, named, _past(named), text.shape[:2])}

    def leave(self, model: "PreTrainedModel", unnamed: tuple, named: dict, output: Any) -> Any:
        if not self.calls:
            found = f"a {type(model).__name__} does not call transformers' attention interface"
            raise CourseError(f"{found}, so a prefix cannot enter: try add_soft_prompt")
        return output


class SoftPrompt(VirtualTokens):
    """Prompt tuning, or with a network P-tuning. The vectors (P, C) stand before the embeddings of
    the text; the logits that come out are those of the text.
    """

    def prepared(self, model: "PreTrainedModel", named: dict) -> dict:
        mask, labels, past = named.get("attention_mask"), named.get("labels"), _past(named)
        static = getattr(named.get("past_key_values"), "is_compileable", False)
        if static or (mask is not None and mask.dim() != 2):
            found = "a soft prompt cannot stand before packed rows, nor in a static cache"
            raise CourseError(f"{found}: pad the rows with collate, or train a prefix")
        embedded = _text(named)
        if embedded.dim() == 2:
            embedded = model.get_input_embeddings()(embedded)
        rows, tokens = embedded.shape[:2]
        given, seen = named.get("position_ids"), past - self.count
        if past and (
            mask.shape[1] != seen + tokens
            if mask is not None
            else given is not None and given[0, 0] != seen
        ):
            found = "a soft prompt stands in the cache, where generate takes it for text"
            raise CourseError(f"{found}: generate without past_key_values, or train a prefix")
        self.cut = 0 if past else self.count  # later the vectors are in the cache
        positions = self.positions(model, named, max(seen, 0), (rows, tokens))
        if mask is not None:
            named = named | {"attention_mask": pad(mask, (self.count, 0), value=1)}
        if self.cut:
            count = torch.arange(self.count, device=positions.device).expand(rows, -1)
            positions = torch.cat([count, positions], 1)
            vectors = self.vectors().to(embedded.dtype).expand(rows, -1, -1)
            embedded = torch.cat([vectors, embedded], 1)
            if labels is not None:
                named = named | {"labels": pad(labels, (self.count, 0), value=IGNORED)}
            if isinstance(named.get("logits_to_keep"), Tensor):  # places in the text
                named = named | {"logits_to_keep": named["logits_to_keep"] + self.count}
        return named | {"input_ids": None, "inputs_embeds": embedded, "position_ids": positions}

    def leave(self, model: "PreTrainedModel", unnamed: tuple, named: dict, output: Any) -> Any:
        if isinstance(output, tuple):
            found = "a soft prompt has to cut its own logits off, which a tuple does not name"
            raise CourseError(f"{found}: leave return_dict=False out")
        rows, tokens = named["inputs_embeds"].shape[:2]
        logits = getattr(output, "logits", None)
        if logits is not None and len(logits) == rows:
            output.logits = logits[:, -(tokens - self.cut) :]
        return output


def _text(named: Mapping) -> Tensor:
    """The tokens (N, T), or their embeddings (N, T, C)."""
    ids = named.get("input_ids")
    return named["inputs_embeds"] if ids is None else ids


def _past(named: Mapping) -> int:
    """Tokens in the cache."""
    cache = named.get("past_key_values")
    return 0 if cache is None else cache.get_seq_length()


def _attention(
    layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """torch's attention, in a layer with a prefix over its keys and values, too.

    q: (N, heads, T, d); k, v: (N, H, S, d), from the cache, too; mask: (N or 1, 1, T, S)
    """
    if (found := getattr(layer, NAME, None)) is not None:
        prefix, number = found
        prefix.calls += 1
        k, v = (
            torch.cat([states.to(k.dtype).expand(len(k), -1, -1, -1), text], 2)
            for states, text in zip(prefix.states(number), (k, v), strict=True)
        )
        mask = pad(mask, (prefix.count, 0), value=mask.dtype == torch.bool)
    return AttentionInterface()["sdpa"](layer, q, k, v, mask, **options)


def _mask(*arguments: Any, **options: Any) -> Tensor:
    """The mask of torch's attention, also where it could be left out."""
    return sdpa_mask(*arguments, **options | {"allow_is_causal_skip": False})


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that compute attention, one in each block.

    Raises CourseError for a model in which they cannot be told.
    """
    surgery.check_model(model)
    found = [
        [one for one in block.modules() if hasattr(one, "layer_idx") and hasattr(one, "is_causal")]
        for block in memory.blocks_of(surgery.uncompiled(model))
    ]
    if not found or any(len(layers) != 1 for layers in found):
        raise CourseError(
            f"a {type(model).__name__} has not one attention layer a block: give a decoder of "
            "transformers, such as a Llama"
        )
    return [layers[0] for layers in found]


def size_of(model: nn.Module) -> tuple[int, int, int]:
    """(L, H, d): layers, heads of keys and values, width of a head."""
    surgery.check_model(model)
    text = model.config.get_text_config()
    layers = text.num_hidden_layers
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return layers, memory.kv_cache_bytes(text, 1, 1, 1) // (2 * layers * width), width


def states_of(model: "PreTrainedModel", ids: Sequence[int]) -> Tensor:
    """What the model keeps of a text: its keys and values, (tokens, 2 L C), as `add_prefix` takes
    them for a start. Raises CourseError for a text that the model cannot read.
    """
    check_free(model)
    model, ids = surgery.uncompiled(model), _checked_ids(ids, model)
    cache, training = DynamicCache(), model.training
    model.eval()
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache)
    model.train(training)
    kept = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    return torch.cat([states[0].transpose(0, 1).flatten(1) for states in kept], 1).float()


def shared_start(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens with which all prompts begin: what can be computed once for all of them.

    >>> shared_start([[5, 7, 1], [5, 7, 2, 3]])
    [5, 7]
    """
    columns = zip(*prompts, strict=False)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


def add_prefix(
    model: "PreTrainedModel",
    tokens: int,
    *,
    hidden: int | None = None,
    start: str | Tensor = "random",
    seed: int = 0,
) -> None:
    """Put a prefix of `tokens` virtual tokens into every attention layer. All other weights freeze.

    hidden: width of the MLP that makes it; None for none (P-tuning v2)
    start: "random", from a normal distribution; "zero"; or (tokens, 2 L C), such as `states_of` a
        text
    Raises CourseError before anything is changed.
    """
    model = _checked(model, tokens, seed)
    _check_network(hidden, start)
    attention = attention_layers(model)
    layers, heads, width = size_of(model)
    size, zero, network = heads * width, _is(start, "zero"), None
    wide = 2 * layers * size
    if zero:  # the last matrix of a network, or the table
        start = "random" if hidden else torch.zeros(tokens, wide)
    with seeded(seed):
        table = _table(tokens, size if hidden else wide, start, '"zero" or states_of(model, ids)')
        if hidden:
            network = nn.Sequential(nn.Linear(size, hidden), nn.Tanh(), nn.Linear(hidden, wide))
            if zero:
                nn.init.zeros_(network[-1].weight)
                nn.init.zeros_(network[-1].bias)
    prefix = Prefix(table, network, heads, width)
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    before, alone = dict(vars(model.config)), _two_logits(model)
    with quiet_transformers():
        model.set_attn_implementation(NAME)
    prefix.config = {
        name: before[name]
        for name, value in vars(model.config).items()
        if value is not before[name]
    }
    if alone is not None and not _computes(model, alone):
        vars(model.config).update(prefix.config)
        found = f"a {type(model).__name__} has attention of its own, such as with sinks"
        raise CourseError(f"{found}, so a prefix cannot enter: try add_soft_prompt")
    for number, layer in enumerate(attention):
        setattr(layer, NAME, (prefix, number))  # a tuple, so that it is not a part of the layer
    _install(model, prefix)


def _two_logits(model: "PreTrainedModel") -> Tensor | None:
    """Logits of a text of two tokens; None where tensors have no numbers."""
    if model.device.type == "meta":
        return None
    training = model.training
    with torch.no_grad():
        ids = torch.arange(2, device=model.device)[None]
        found = model.eval()(input_ids=ids).logits.float()
    model.train(training)
    return found


def _computes(model: "PreTrainedModel", expected: Tensor) -> bool:
    """Does it give these logits, as before?"""
    try:
        return torch.allclose(_two_logits(model), expected, rtol=0.02, atol=0.02)
    except Exception:  # whatever attention raises that is not torch's
        return False


def add_soft_prompt(
    model: "PreTrainedModel",
    tokens: int,
    *,
    encoder: str | None = None,
    hidden: int | None = None,
    start: str | Sequence[int] | Tensor = "random",
    seed: int = 0,
) -> None:
    """Put `tokens` trained vectors before the embeddings of every text. All other weights freeze.

    encoder: None for prompt tuning; "mlp" or "lstm", of width `hidden`, for P-tuning
    start: "random", from a normal distribution; "vocabulary", embeddings of random tokens; the ids
        of `tokens` tokens, for their embeddings; or the vectors, (tokens, C)
    Raises CourseError before anything is changed.
    """
    model = _checked(model, tokens, seed)
    if encoder not in (None, "mlp", "lstm") or (encoder is None) != (hidden is None):
        found = f"encoder={encoder!r} with hidden={hidden!r}"
        raise CourseError(f'{found}, expected "mlp" or "lstm" and a width, or neither')
    _check_network(hidden, start)
    embeddings = model.get_input_embeddings().weight
    count, width = embeddings.shape
    with seeded(seed):
        if _is(start, "vocabulary"):
            start = torch.randint(count, (tokens,)).tolist()
        if isinstance(start, Sequence) and not isinstance(start, str):
            ids = torch.tensor(_checked_ids(start, model), device=model.device)
            start = model.get_input_embeddings()(ids).detach()  # some scale what they look up
        table = _table(tokens, width, start, '"vocabulary", or as many ids')
        network = _encoders(width, hidden)[encoder]() if encoder else None
    _install(model, SoftPrompt(table, network))


class _Bidirectional(nn.LSTM):
    """(P, C) -> (P, 2 hidden), in float32: not every CPU has an LSTM in bfloat16."""

    def forward(self, table: Tensor) -> Tensor:
        with torch.autocast("cuda" if table.is_cuda else "cpu", enabled=False):
            return super().forward(table)[0]


def _encoders(width: int, hidden: int) -> dict[str, Any]:
    linear, twice = nn.Linear, 2 * hidden
    return {
        "mlp": lambda: nn.Sequential(
            *(linear(width, hidden), nn.ReLU(), linear(hidden, hidden), nn.ReLU()),
            linear(hidden, width),
        ),
        "lstm": lambda: nn.Sequential(
            _Bidirectional(width, hidden, LSTM_LAYERS, bidirectional=True),
            *(linear(twice, twice), nn.ReLU(), linear(twice, width)),
        ),
    }


def _is(start: object, name: str) -> bool:
    return isinstance(start, str) and start == name


def _table(tokens: int, width: int, start: object, others: str) -> Tensor:
    """(tokens, width). Raises CourseError for another start; others: those there are."""
    if _is(start, "random"):
        return torch.randn(tokens, width)
    if not isinstance(start, Tensor):
        found = repr(start) if isinstance(start, str) else f"a {type(start).__name__}"
        raise CourseError(f'start is {found}, expected "random", {others}')
    if start.shape != (tokens, width):
        expected = f"expected {(tokens, width)}: choose as many tokens as it has"
        raise CourseError(f"start is {tuple(start.shape)}, {expected}")
    if not start.isfinite().all():
        raise CourseError("start has numbers that are not finite: load the base again")
    return start.detach().float().clone()


def _check_network(hidden: int | None, start: object) -> None:
    """Raise CourseError if no network of this width can make the virtual tokens."""
    if hidden is None:
        return
    if type(hidden) is not int or not 1 <= hidden <= WIDEST:
        raise CourseError(f"hidden={hidden!r} must be a whole number in 1..{WIDEST}, such as 128")
    if not isinstance(start, str) or start == "vocabulary":
        advice = "leave hidden and encoder out, or start at random"
        raise CourseError(f"a network cannot be made to give a start: {advice}")


def _checked(model: nn.Module, tokens: int, seed: int) -> "PreTrainedModel":
    """The model, not compiled. Raises CourseError if it can have no such virtual tokens."""
    check_free(model, seed)
    most = min(most_positions(model), 2**20)
    if type(tokens) is not int or not 1 <= tokens < most:
        raise CourseError(f"tokens={tokens!r} must be a whole number in 1..{most - 1}")
    model = surgery.uncompiled(model)
    encoder = getattr(model.config, "is_encoder_decoder", False)
    if encoder or "position_ids" not in inspect.signature(model.forward).parameters:
        found = "has an encoder" if encoder else "takes no positions"
        advice = "give a decoder of transformers, such as a Llama"
        raise CourseError(
            f"a {type(model).__name__} {found}, so it takes no virtual tokens: {advice}"
        )
    return model


def _checked_ids(ids: Sequence[int], model: "PreTrainedModel") -> list[int]:
    """Raise CourseError for a text that the model cannot read."""
    ids, most = list(ids), most_positions(model)
    if not 1 <= len(ids) <= most or not all(isinstance(one, int) for one in ids):
        found = f"a text of {len(ids)} tokens" if ids else "no text"
        raise CourseError(f"found {found}, expected 1 to {most} token ids: encode a text")
    check_ids(ids, model)
    return ids


def check_free(model: nn.Module, seed: int = 0) -> None:
    """Raise CourseError if this is no model of transformers, or has an adapter already."""
    surgery.check_model(model)
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "config"):
        found = f"a {type(model).__name__} is no model of transformers"
        raise CourseError(f"{found}: give one, such as base.model")
    if hasattr(model, "peft_config"):
        raise CourseError("the model has an adapter of peft: load the base again")
    surgery.check_no_additions(model)
    if surgery.wrapped_layers(model):
        raise CourseError("the model has an adapter already: remove it, or load the base again")
    if type(seed) is not int or not 0 <= seed < 2**64:
        raise CourseError(f"seed={seed!r} must be a whole number from 0 to {2**64 - 1}")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's generator of the CPU set to a seed, and as before afterwards."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would set those of GPUs, too
    try:
        yield
    finally:
        torch.set_rng_state(before)


def _install(model: "PreTrainedModel", tokens: VirtualTokens) -> None:
    """Raises CourseError, and leaves the model as it was, if it cannot compute with them."""
    model.virtual_tokens = tokens.to(model.device)
    tokens.handles = [
        model.register_forward_pre_hook(tokens.enter, with_kwargs=True),
        model.register_forward_hook(tokens.leave, with_kwargs=True),
    ]
    try:
        with torch.no_grad(), seeded(0):
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device))
    except Exception as error:  # whatever a model raises that was not made for them
        _take_out(model)
        if isinstance(error, CourseError):
            raise
        found = f"a {type(model).__name__} does not compute with them ({first_line(error)})"
        raise CourseError(f"{found}: give a decoder of transformers, such as a Llama") from None
    model.requires_grad_(False)
    tokens.requires_grad_(True)
    surgery.refuse_save(model)


def _take_out(model: "PreTrainedModel") -> None:
    tokens = model.virtual_tokens
    for handle in tokens.handles:
        handle.remove()
    if isinstance(tokens, Prefix):
        for layer in attention_layers(model):
            delattr(layer, NAME)
        vars(model.config).update(tokens.config)
    del model.virtual_tokens


def virtual_tokens(model: nn.Module) -> VirtualTokens | None:
    """Those of the model, if it has any."""
    found = getattr(surgery.uncompiled(model), "virtual_tokens", None)
    return found if isinstance(found, VirtualTokens) else None


def fold(model: nn.Module) -> None:
    """Replace the network that makes the virtual tokens by what it makes: the model computes the
    same, and the network is not needed any more. Without a network nothing happens.
    """
    tokens = virtual_tokens(model)
    if tokens is None:
        raise CourseError("the model has no virtual tokens: add_prefix adds them")
    if tokens.network is None:
        return
    with torch.no_grad():
        table = tokens.vectors()
    tokens.table, tokens.network = nn.Parameter(table), None


def remove_virtual_tokens(model: nn.Module) -> None:
    """Take them out; the model is the base again, and all its weights can train. A model that has
    none stays as it is. Raises CourseError where they are a part of MAM or UniPELT.
    """
    surgery.check_model(model)
    if virtual_tokens(model) is not None:
        additions = [
            one
            for one in surgery.uncompiled(model).modules()
            if isinstance(one, surgery.Addition) and not isinstance(one, VirtualTokens)
        ]
        if additions:
            found = "the virtual tokens are a part of a method that has adapters, too"
            raise CourseError(f"{found}: take it out whole, with adapters.remove_adapters")
        _take_out(surgery.uncompiled(model))
        surgery.restore(model)
