"""Adapters of every kind as files, in peft's format where it has one: peft reads ours, and we read
peft's.

    in peft's format      peft_type                                    tensors
    LoRA, AdaLoRA         LORA, ADALORA                                see `lora_files`
    virtual tokens        PROMPT_TUNING, P_TUNING, PREFIX_TUNING       prompt_embeddings
    IA3                   IA3                                          <layer>.ia3_l
    norms                 LN_TUNING                                    <norm>.ln_tuning_layers

    in one of our own     BOTTLENECK, PARALLEL, MAM, UNIPELT, BITFIT   named as in the model

The configs of the second group say "format": "course_lib", and peft refuses them.

Of virtual tokens that a network makes, files hold what it makes: the network is thrown away, in
ours as in peft's. They compute the same, and train on without it.

A base with the same layers and other weights cannot be told from the right one, because a config
keeps only its name.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from course_lib import adapters, lora_files, prefix, surgery, tensor_files
from course_lib.adalora import adalora_layers
from course_lib.adapters import Beside, Bottleneck
from course_lib.lora import LowRank, lora_layers
from course_lib.lora_files import PREFIX, brief_names
from course_lib.prefix import Prefix
from course_lib.runtime import CourseError
from course_lib.tensor_files import CONFIG, WEIGHTS
from course_lib.vocabulary import trained_rows

__all__ = ["CONFIG", "WEIGHTS", "load_adapter", "save_adapter"]

Settings = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

FORMAT = "course_lib"  # of the kinds that peft has not
TABLE = "prompt_embeddings"  # the one tensor of virtual tokens, under this name alone
LARGEST = 2**31  # of a number in a config
SETTINGS = set(  # any other that is set would make the adapter more than we know
    "peft_type task_type inference_mode base_model_name_or_path revision peft_version auto_mapping "
    "format".split()
)
OF_TOKENS = set(
    "num_virtual_tokens token_dim num_attention_heads num_layers num_transformer_submodules "
    "encoder_hidden_size".split()
)
OF_LAYERS = set("target_modules exclude_modules fan_in_fan_out".split())


@dataclass(frozen=True)
class Kind:
    """What a kind of adapter needs to be written and read; tensors by their names in the file.

    described: model -> config and tensors
    expected: (model, config, tensors) -> the shapes that the tensors should have. Raises
        CourseError for a model without a place for them
    add: put the tensors, which fit, into the model
    """

    described: Callable[[nn.Module], tuple[dict[str, Any], dict[str, Tensor]]]
    expected: Callable[[nn.Module, Settings, Tensors], Shapes]
    add: Callable[[nn.Module, Settings, Tensors], None]
    settings: set[str]
    of_peft: bool = True


def save_adapter(
    model: nn.Module,
    folder: Path | str,
    name: str = "default",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the adapter of `model` whole or not at all, of LoRA the one called `name` and what
    trains beside it; an adapter that lies in `folder` is replaced. A network that makes virtual
    tokens is not written, only what it makes.

    dtype: of the adapter in the file; float16 halves it

    Raises CourseError if `folder` holds anything else, or cannot be written, for an adapter that is
    not as one call makes it, such as LoRA of two ranks, since a config keeps one number of each,
    for weights that are not finite, and for a trained weight that the format has no place for.
    """
    folder = Path(folder).expanduser().resolve()
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise CourseError(f"dtype={dtype!r} keeps no weights: choose torch.float32 or float16")
    kind = _kind_of(model)
    if kind in lora_files.MATRIX:
        settings, tensors = lora_files.described(model, name, dtype)
    else:
        _check_nothing_else_trains(model, kind)
        settings, tensors = KINDS[kind].described(model)
        settings = lora_files.shared_settings(model) | {"peft_type": kind} | settings
        if not KINDS[kind].of_peft:
            settings["format"] = FORMAT
        expected = KINDS[kind].expected(model, settings, tensors)
        if odd := _misfit(tensors, expected):
            advice = "expected it as one call makes it: keep the model's state_dict instead"
            raise CourseError(f"the adapter is no plain {kind} ({odd}), {advice}")
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    tensor_files.publish(folder, settings, tensors)


def load_adapter(
    model: nn.Module, folder: Path | str, name: str = "default", say: Callable[[str], None] = print
) -> None:
    """Add the adapter in `folder` to `model`; it is then the one in use, and can be trained on, as
    can what lies beside the matrices of LoRA. An AdaLoRA adapter does not train: its ranks are
    chosen. Virtual tokens train on without the network that made them.

    name: of a LoRA adapter, which can stand beside others
    say: gets a line where the file covers a part of the layers that its config names, and where it
        was trained with a network or dropout, which is not done here
    Raises CourseError before anything is changed, if the files are missing, damaged or more than
    their kind, hold a weight that is not finite, or if `model` has no such layers, or an adapter.
    """
    folder = Path(folder).expanduser()
    settings, tensors = tensor_files.read(folder)
    kind = settings.get("peft_type")
    if not isinstance(kind, str) or kind not in KINDS | lora_files.MATRIX:
        known = ", ".join(KINDS | lora_files.MATRIX)
        raise CourseError(
            f"{folder / CONFIG} does not describe an adapter known here: expected a peft_type of "
            f"{known}"
        )
    _check_free(model, but_lora=kind in lora_files.MATRIX)
    if kind in lora_files.MATRIX:
        lora_files.load(model, folder, settings, tensors, name, say)
        return
    _check_plain(settings, tensors, folder)
    base = settings.get("base_model_name_or_path") or "not named"
    try:
        expected = KINDS[kind].expected(model, settings, tensors)
    except CourseError as error:
        raise CourseError(
            f"the adapter in {folder} is damaged or for another base ({base}): {error}"
        ) from None
    if odd := _misfit(tensors, expected):
        advice = f"load the base it was trained on ({base})"
        raise CourseError(f"the adapter in {folder} does not fit: {odd}; {advice}")
    with torch.no_grad():
        KINDS[kind].add(surgery.uncompiled(model), settings, tensors)
    if left := _left_out(model, settings, tensors):
        part = f"a part of the layers that its config names; {min(left)} stays as the base has it"
        say(f"the adapter in {folder} covers {part}")
    if kind == "P_TUNING" or settings.get("prefix_projection"):
        found = f"the virtual tokens in {folder} were made by a network, which files do not keep"
        say(f"{found}; they compute the same here, and train on as a table")


def _parts(model: nn.Module) -> dict[str, bool]:
    """Which adapters the model has; what is written as one is one."""
    return {
        "LoRA": bool(lora_layers(model)),
        "AdaLoRA": bool(adalora_layers(model)),
        "IA3": bool(adapters.ia3_layers(model)),
        "weights of its own that train": bool(adapters.originals_of(model)),
        "virtual tokens or adapters": bool(
            prefix.virtual_tokens(model) is not None or adapters.beside(model)
        ),
    }


def _kind_of(model: nn.Module) -> str:
    """The kind of the model's adapter; of a model without one LORA. Raises CourseError for one that
    has several.
    """
    surgery.check_model(model)
    found = [part for part, there in _parts(model).items() if there]
    if len(found) > 1:
        several = f"the model has {found[0]} and {found[1]}, a file only one of them"
        raise CourseError(f"{several}: keep the model's state_dict instead")
    tokens, updates = prefix.virtual_tokens(model), adapters.beside(model).values()
    originals = adapters.originals_of(model)
    if adapters.ia3_layers(model):
        return "IA3"
    if originals:
        return "BITFIT" if all(_part(name) == "bias" for name in originals) else "LN_TUNING"
    if any(one.gate is not None for one in updates):
        return "UNIPELT"
    if updates and tokens is not None:
        return "MAM"
    if updates:
        return "BOTTLENECK" if any(one.reads_output for one in updates) else "PARALLEL"
    if isinstance(tokens, Prefix):
        return "PREFIX_TUNING"
    if tokens is not None:
        return "PROMPT_TUNING" if tokens.network is None else "P_TUNING"
    return "ADALORA" if adalora_layers(model) else "LORA"


def _check_free(model: nn.Module, *, but_lora: bool) -> None:
    """Raise CourseError for a model that has an adapter, other than LoRA if a second may stand
    beside it.
    """
    surgery.check_model(model)
    found = [part for part, there in _parts(model).items() if there]
    if but_lora:
        found = [part for part in found if "LoRA" not in part]
    if found:
        raise CourseError("the model has an adapter already: remove it, or load the base again")


def _check_plain(settings: Settings, tensors: Tensors, folder: Path) -> None:
    """Raise CourseError if the config says what is not known here, or there are no tensors."""
    kind = settings["peft_type"]
    known = SETTINGS | KINDS[kind].settings
    more = [setting for setting, value in settings.items() if value and setting not in known]
    if (settings.get("format") == FORMAT) == KINDS[kind].of_peft:
        more.append(f"format={settings.get('format')!r}")
    if not isinstance(settings.get("target_modules"), str | list | None):
        more.append(f"target_modules={settings['target_modules']!r}")
    if settings.get("num_transformer_submodules") not in (None, 1):
        more.append(f"num_transformer_submodules={settings['num_transformer_submodules']!r}")
    if more or not tensors:
        found = more[0] if more else "no weights"
        advice = "load it with peft" if KINDS[kind].of_peft else "get it again"
        raise CourseError(f"the adapter in {folder} is not plain {kind} ({found}): {advice}")


def _misfit(tensors: Tensors, expected: Mapping[str, tuple[int, ...]]) -> str:
    """What is wrong with one of the tensors, or nothing."""
    for name in sorted(tensors.keys() - expected.keys()):
        return f"there is no place for {name.removeprefix(PREFIX)}"
    for name, shape in expected.items():
        found = tuple(tensors[name].shape) if name in tensors else "missing"
        if found != shape:
            return f"{name.removeprefix(PREFIX)} is {found}, expected {shape}"
    return ""


def _check_nothing_else_trains(model: nn.Module, kind: str) -> None:
    """Raise CourseError for a trained weight that is not of the adapter."""
    weights = dict(surgery.uncompiled(model).named_parameters())
    own = {id(weights[name]) for name in adapters.originals_of(model)}
    own |= {id(layer.scale) for layer in adapters.ia3_layers(model).values()}
    own |= {id(weight) for _, weight in _update_weights(model)}
    tokens = prefix.virtual_tokens(model)
    own |= set() if tokens is None else {*map(id, tokens.parameters())}
    for name, weight in weights.items():
        if id(weight) not in own and (weight.requires_grad or trained_rows(weight)):
            found = f"{name} trains, and a file of kind {kind} has no place for it"
            raise CourseError(f"{found}: freeze it, or keep the model's state_dict instead")


def _left_out(model: nn.Module, settings: Settings, tensors: Tensors) -> set[str]:
    """The modules that the config of IA3 or of norms names and the file leaves out."""
    if settings["peft_type"] == "IA3":
        return lora_files.named_layers(model, settings) - {*_named(tensors, "ia3_l")}
    if settings["peft_type"] == "LN_TUNING" and isinstance(settings.get("target_modules"), list):
        ends = settings["target_modules"]
        found = {path for path, _ in _norm_parts(tensors)}
        return {
            path
            for path in adapters.norms(model)
            if any(f".{path}".endswith(f".{end}") for end in ends)
        } - found
    return set()


def _number(settings: Settings, key: str, type_: type = int) -> Any:
    """A positive number of the config."""
    found = settings.get(key)
    if isinstance(found, bool) or not isinstance(found, type_) or not 0 < found < LARGEST:
        raise CourseError(f"{key}={found!r}, expected a positive number")
    return found


def _part(name: str) -> str:
    return name.rpartition(".")[2]


def _exactly(paths: Iterable[str]) -> str:
    """The regular expression for these names and no others."""
    return "|".join(map(re.escape, paths))


# --- virtual tokens


def _tokens(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tokens, text = prefix.virtual_tokens(model), model.config.get_text_config()
    with torch.no_grad():
        table = tokens.vectors().detach()
    settings = {
        "num_virtual_tokens": tokens.count,
        "token_dim": table.shape[1],
        "num_attention_heads": text.num_attention_heads,
        "num_layers": text.num_hidden_layers,
        "num_transformer_submodules": 1,
    }
    network = tokens.network
    if isinstance(tokens, Prefix):
        width = tokens.heads * tokens.width
        settings |= {"token_dim": width, "num_attention_heads": tokens.heads}
        settings |= {
            "prefix_projection": network is not None,
            "encoder_hidden_size": width if network is None else network[0].out_features,
        }
    elif network is not None:
        lstm = isinstance(network[0], nn.LSTM)
        settings |= {
            "encoder_reparameterization_type": "LSTM" if lstm else "MLP",
            "encoder_hidden_size": network[0].hidden_size if lstm else network[0].out_features,
            "encoder_num_layers": prefix.LSTM_LAYERS,
        }
    return settings, {TABLE: table}


def _token_shapes(model: nn.Module, settings: Settings, tensors: Tensors) -> Shapes:
    count = _number(settings, "num_virtual_tokens")
    if settings["peft_type"] == "PREFIX_TUNING":
        layers, heads, width = prefix.size_of(model)
        said = [settings.get(name) for name in ("num_layers", "num_attention_heads", "token_dim")]
        if said not in ([None] * 3, [layers, heads, heads * width]):
            found = f"layers, heads, width {said}, expected {[layers, heads, heads * width]}"
            raise CourseError(f"the prefix is of another base: {found}: load that one")
        return {TABLE: (count, _prefix_width(model))}
    return {TABLE: (count, model.get_input_embeddings().weight.shape[1])}


def _prefix_width(model: nn.Module) -> int:
    layers, heads, width = prefix.size_of(model)
    return 2 * layers * heads * width


def _add_tokens(model: nn.Module, settings: Settings, tensors: Tensors) -> None:
    add = prefix.add_prefix if settings["peft_type"] == "PREFIX_TUNING" else prefix.add_soft_prompt
    add(model, settings["num_virtual_tokens"], start=tensors[TABLE].float())


# --- IA3


def _ia3(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    layers = adapters.ia3_layers(model)
    on_input = [path for path, layer in layers.items() if layer.on_input]
    names = surgery.linear_layers(model)
    targets, inputs = brief_names(layers, names), brief_names(on_input, names)
    if not {*inputs} <= {*targets}:  # peft compares the names as they are written
        targets, inputs = list(layers), on_input
    settings = {
        "target_modules": targets,
        "feedforward_modules": inputs,
        "fan_in_fan_out": all(isinstance(layer.base, Conv1D) for layer in layers.values()),
    }
    return settings, {
        f"{PREFIX}{path}.ia3_l": layer.scale[None] if layer.on_input else layer.scale[:, None]
        for path, layer in layers.items()
    }


def _named(tensors: Tensors, part: str) -> Iterator[str]:
    """The modules that have a tensor of this name."""
    for name in tensors:
        if name.startswith(PREFIX) and name.endswith(f".{part}"):
            yield name.removeprefix(PREFIX).removesuffix(f".{part}")


def _ia3_shapes(model: nn.Module, settings: Settings, tensors: Tensors) -> Shapes:
    layers, shapes = surgery.linear_layers(model), {}
    for path in _named(tensors, "ia3_l"):
        if path not in layers:
            raise CourseError(f"this model has no linear layer {path}")
        d_out, d_in = surgery.layer_shape(layers[path])
        name = f"{PREFIX}{path}.ia3_l"
        shapes[name] = (1, d_in) if tensors[name].shape[:1] == (1,) else (d_out, 1)
    return shapes


def _add_ia3(model: nn.Module, settings: Settings, tensors: Tensors) -> None:
    paths = {*_named(tensors, "ia3_l")}
    on_input = [path for path in paths if len(tensors[f"{PREFIX}{path}.ia3_l"]) == 1]
    adapters.add_ia3(model, _exactly(paths), _exactly(on_input))
    for path, layer in adapters.ia3_layers(model).items():
        layer.scale.copy_(tensors[f"{PREFIX}{path}.ia3_l"].flatten())


# --- weights of the model itself


def _norms(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    weights = dict(surgery.uncompiled(model).named_parameters())
    tensors, paths = {}, {}
    for name in adapters.originals_of(model):
        path, _, part = name.rpartition(".")
        paths[path] = tensors[f"{PREFIX}{path}.ln_tuning_layers.{part}"] = weights[name]
    names = [path for path, _ in surgery.uncompiled(model).named_modules()]
    return {"target_modules": brief_names(paths, names)}, tensors


def _norm_parts(tensors: Tensors) -> Iterator[tuple[str, str]]:
    """The norms with weights in the file, and "weight" or "bias"."""
    for part in ("weight", "bias"):
        for path in _named(tensors, f"ln_tuning_layers.{part}"):
            yield path, part


def _norm_shapes(model: nn.Module, settings: Settings, tensors: Tensors) -> Shapes:
    found, shapes = adapters.norms(model), {}
    for path, _ in _norm_parts(tensors):
        if path not in found:
            raise CourseError(f"this model has no norm {path}")
        for part, weight in found[path].named_parameters(recurse=False):
            shapes[f"{PREFIX}{path}.ln_tuning_layers.{part}"] = tuple(weight.shape)
    return shapes


def _add_norms(model: nn.Module, settings: Settings, tensors: Tensors) -> None:
    adapters.train_norms(model, {path for path, _ in _norm_parts(tensors)})
    for path, part in _norm_parts(tensors):
        weight = model.get_submodule(path).get_parameter(part)
        weight.copy_(tensors[f"{PREFIX}{path}.ln_tuning_layers.{part}"])


def _biases(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    weights = dict(surgery.uncompiled(model).named_parameters())
    return {}, {f"{PREFIX}{name}": weights[name] for name in adapters.originals_of(model)}


def _bias_shapes(model: nn.Module, settings: Settings, tensors: Tensors) -> Shapes:
    shapes = {
        f"{PREFIX}{name}": tuple(weight.shape)
        for name, weight in surgery.uncompiled(model).named_parameters()
        if _part(name) == "bias"
    }
    if all(layer.bias is None for layer in surgery.linear_layers(model).values()):
        for path, layer in surgery.find_layers(model, surgery.ALL_LINEAR).items():
            shapes[f"{PREFIX}{path}.bias"] = surgery.layer_shape(layer)[:1]
    return shapes


def _add_biases(model: nn.Module, settings: Settings, tensors: Tensors) -> None:
    adapters.train_biases(model)
    _fill(model, tensors)


def _fill(model: nn.Module, tensors: Tensors) -> None:
    """Put tensors into the weights that have their names."""
    weights = dict(model.named_parameters())
    for name, tensor in tensors.items():
        weights[name.removeprefix(PREFIX)].copy_(tensor)


# --- layers beside others, and virtual tokens


def _update_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights of what stands beside frozen layers, by name."""
    for path, one in adapters.beside(model).items():
        for name, weight in one.named_parameters():
            if not name.startswith("base."):
                yield f"{path}.{name}", weight


def _layers(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of BOTTLENECK, PARALLEL, MAM and UNIPELT."""
    settings, tensors = {}, dict(_update_weights(model))
    updates = {path: one.update for path, one in adapters.beside(model).items()}
    bottlenecks = [one for one in updates.values() if isinstance(one, Bottleneck)]
    low = {path: one for path, one in updates.items() if isinstance(one, LowRank)}
    if bottlenecks:
        settings |= {"bottleneck": bottlenecks[0].up.in_features, "scale": bottlenecks[0].scale}
    if {one.scale for one in bottlenecks} - {settings.get("scale")} or any(
        one.alpha != 2 * one.rank or one.rank_stabilized for one in low.values()
    ):
        advice = "keep the model's state_dict instead"
        raise CourseError(f"the scales of the adapter differ, and a config keeps one: {advice}")
    if low:
        settings |= {"r": next(iter(low.values())).rank}
    if (tokens := prefix.virtual_tokens(model)) is not None:
        settings |= {
            "num_virtual_tokens": tokens.count,
            "prefix_projection": tokens.network is not None,
        }
        with torch.no_grad():
            tensors["virtual_tokens.table"] = tokens.vectors().detach()
        if getattr(tokens, "gates", None) is not None:
            tensors["virtual_tokens.gates"] = tokens.gates
    else:
        settings["target_modules"] = list(updates)
    if low:
        settings["target_modules"] = list(low)
    return settings, {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}


def _layer_shapes(model: nn.Module, settings: Settings, tensors: Tensors) -> Shapes:
    kind, size = settings["peft_type"], _number(settings, "bottleneck")
    _number(settings, "scale", int | float)
    shapes: Shapes = {}
    if kind in ("MAM", "UNIPELT"):
        count = _number(settings, "num_virtual_tokens")
        shapes["virtual_tokens.table"] = count, _prefix_width(model)
    if kind in ("MAM", "PARALLEL"):
        width = model.config.get_text_config().hidden_size
        for path in adapters.feedforward_modules(model):
            shapes |= _shapes_beside(path, width, bottleneck=size)
        return {f"{PREFIX}{name}": shape for name, shape in shapes.items()}
    targets = settings.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
        raise CourseError(f"target_modules={targets!r}, expected names of layers")
    following = surgery.find_layers(model, targets)
    if kind == "UNIPELT":
        shapes["virtual_tokens.gates"] = (prefix.size_of(model)[0],)
        rank = _number(settings, "r")
        for path, layer in following.items():
            d_out, d_in = surgery.layer_shape(layer)
            shapes |= _shapes_beside(path, d_in, d_out, rank=rank)
        following = surgery.find_layers(model, adapters.stream_writers(model)[-1:])
    for path, layer in following.items():
        width, _ = surgery.layer_shape(layer)
        shapes |= _shapes_beside(path, width, bottleneck=size, gated=kind == "UNIPELT")
    return {f"{PREFIX}{name}": shape for name, shape in shapes.items()}


def _shapes_beside(
    path: str,
    width: int,
    d_out: int = 0,
    *,
    bottleneck: int = 0,
    rank: int = 0,
    gated: bool = False,
) -> Shapes:
    """The shapes of what stands beside the module of this name."""
    with torch.device("meta"):
        update = LowRank(width, d_out, rank, 1) if rank else Bottleneck(width, bottleneck)
        one = Beside(nn.Identity(), update, width, reads_output=False, gated=gated or rank > 0)
    return {f"{path}.{name}": tuple(weight.shape) for name, weight in one.named_parameters()}


def _add_layers(model: nn.Module, settings: Settings, tensors: Tensors) -> None:
    kind, size = settings["peft_type"], settings["bottleneck"]
    tokens, scale = settings.get("num_virtual_tokens"), settings["scale"]
    if kind == "BOTTLENECK":
        adapters.add_bottlenecks(model, size, _exactly(_named(tensors, "update.up.weight")))
    elif kind == "PARALLEL":
        adapters.add_parallel(model, size, scale)
    elif kind == "MAM":
        adapters.add_mam(model, tokens, size, scale)
    else:
        targets = _exactly(_named(tensors, "update.A"))
        adapters.add_unipelt(model, tokens, settings["r"], size, targets)
    _fill(model, tensors)


OF_OURS = {"num_virtual_tokens", "prefix_projection", "bottleneck", "scale", "r", "target_modules"}
TOKENS = OF_TOKENS | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"}
ENCODED = OF_TOKENS | {
    "encoder_reparameterization_type",
    "encoder_num_layers",
    "encoder_dropout",
}
KINDS = {
    "PROMPT_TUNING": Kind(_tokens, _token_shapes, _add_tokens, TOKENS | {"tokenizer_kwargs"}),
    "P_TUNING": Kind(_tokens, _token_shapes, _add_tokens, ENCODED),
    "PREFIX_TUNING": Kind(
        _tokens, _token_shapes, _add_tokens, OF_TOKENS | {"prefix_projection", "init_weights"}
    ),
    "IA3": Kind(
        _ia3, _ia3_shapes, _add_ia3, OF_LAYERS | {"feedforward_modules", "init_ia3_weights"}
    ),
    "LN_TUNING": Kind(_norms, _norm_shapes, _add_norms, OF_LAYERS),
    "BITFIT": Kind(_biases, _bias_shapes, _add_biases, set(), of_peft=False),
} | {
    kind: Kind(_layers, _layer_shapes, _add_layers, OF_OURS, of_peft=False)
    for kind in ("BOTTLENECK", "PARALLEL", "MAM", "UNIPELT")
}
