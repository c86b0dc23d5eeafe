"""Surgery on models: find linear layers by name, put another module in their place, count weights.

A linear layer is an nn.Linear (bitsandbytes' quantised ones are, too) or GPT-2's Conv1D, which
computes the same with its weight stored transposed, (d_in, d_out). Which layers a method adapts by
default depends on the model's family. A widely copied table and peft's own mapping say so;
`target_table` puts them side by side. They disagree about Phi alone: the table names `Wqkv` of the
first releases, the layers of today's implementation are called `q_proj`, `k_proj` and `v_proj`.
Where peft knows a family, its names are used here; for the others, those of the table.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from course_lib import hub, models
from course_lib.runtime import CourseError, first_line, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ALL_LINEAR = "all-linear"
ORIGINALS = "originals"  # the attribute of a model in which some of its own weights train
Targets = str | Sequence[str]

COPIED_TARGETS = {  # model_type of config.json: names as a widely copied table gives them
    "baichuan": ["W_pack"],  # Baichuan 1 and 2
    "bloom": ["query_key_value"],  # BLOOM, BLOOMZ
    "chatglm": ["query_key_value"],  # ChatGLM3
    "falcon": ["query_key_value"],
    "internlm": ["q_proj", "v_proj"],
    "llama": ["q_proj", "v_proj"],  # LLaMA 1 and 2
    "mistral": ["q_proj", "v_proj"],
    "mixtral": ["q_proj", "v_proj"],
    "phi": ["Wqkv"],  # Phi-1.5, Phi-2
    "qwen": ["c_attn"],  # the first generation
    "xverse": ["q_proj", "v_proj"],
    "Yi": ["q_proj", "v_proj"],
}


class LinearWrapper(nn.Module):
    """What stands in for the linear layer `base` and computes more than it; found under the name of
    that layer. `weight` and `bias` are those of `base`: some models read them (T5 the dtype).
    """

    base: nn.Module

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias


class Addition(nn.Module):
    """What a method puts into a model and `remove_...` takes out again: virtual tokens, adapters.

    kind: how errors call it, and with underscores the end of that function's name
    """

    kind = "adapters"


@dataclass(frozen=True)
class Count:
    """Numbers of weights. trained: those with a gradient."""

    trained: int
    total: int

    def __str__(self) -> str:
        return f"{self.trained:,} of {self.total:,} weights train ({self.trained / self.total:.4%})"


def check_model(model: nn.Module) -> None:
    """Raise CourseError for what is no model, such as a base that holds one."""
    if not isinstance(model, nn.Module):
        raise CourseError(f"found a {type(model).__name__}, expected a model, such as base.model")


def check_no_additions(model: nn.Module) -> None:
    """Raise CourseError if the model has virtual tokens or adapters, or trains weights of its own
    that are kept as they were.
    """
    found = [one for one in uncompiled(model).modules() if isinstance(one, Addition)]
    if found or hasattr(uncompiled(model), ORIGINALS):
        kind = (found[0] if found else Addition()).kind
        advice = f"remove_{kind.replace(' ', '_')} first"
        raise CourseError(f"the model has {kind} already: {advice}")


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that torch.compile was given, whose layers have the names of the family."""
    return next(model.children()) if type(model).__name__ == "OptimizedModule" else model


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer, or what wraps it, by its name."""
    found = {
        name: module
        for name, module in uncompiled(model).named_modules()
        if isinstance(module, nn.Linear | Conv1D | LinearWrapper)
    }
    wrapped = {
        f"{name}.base" for name, module in found.items() if isinstance(module, LinearWrapper)
    }
    return {name: module for name, module in found.items() if name not in wrapped}


def wrapped_layers(model: nn.Module) -> dict[str, LinearWrapper]:
    """The layers in whose place a method has put its own, by name."""
    return {
        name: module
        for name, module in uncompiled(model).named_modules()
        if isinstance(module, LinearWrapper)
    }


def find_layers(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """The linear layers that `targets` means, by name; the rules are peft's.

    targets: a list of names, each the end of a layer's name ("q_proj") or the whole; or
        "all-linear", every one except the output head; any other string is a regular expression for
        whole names
    Raises CourseError if a target means no layer, and lists what there is; for a model that is a
    linear layer itself, too.

    >>> list(find_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), ["2"]))
    ['2']
    """
    layers = linear_layers(model)
    if not layers or "" in layers:
        raise CourseError(
            f"a {type(model).__name__} holds no linear layers: give a model that does, such as "
            "nn.Sequential(layer)"
        )
    if targets == ALL_LINEAR:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        return {name: layer for name, layer in layers.items() if layer is not head}
    if isinstance(targets, str):
        try:
            found = {name for name in layers if re.fullmatch(targets, name)}
        except re.error as error:
            choice = f'give a list of some of {_names(model)}, or "{ALL_LINEAR}"'
            raise CourseError(
                f"targets={targets!r} is no regular expression ({error}): {choice}"
            ) from None
        missing = [] if found else [targets]
    else:
        ends = {
            target: {name for name in layers if f".{name}".endswith(f".{target}")}
            for target in targets
        }
        found = set().union(*ends.values())
        missing = [target for target, names in ends.items() if not names]
    if missing or not found:
        hint = f"no linear layer is called {missing[0]!r}" if missing else "there are no targets"
        raise CourseError(f'{hint}: give a list of some of {_names(model)}, or "{ALL_LINEAR}"')
    return {name: layer for name, layer in layers.items() if name in found}


def _names(model: nn.Module) -> str:
    """The last parts of the names of the linear layers, each once."""
    return (
        ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear_layers(model)))
        or "no linear layer"
    )


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer, whichever way its weight lies, and quantised or not."""
    if isinstance(layer, LinearWrapper):
        return layer_shape(layer.base)
    return (
        (layer.nf, layer.nx)
        if isinstance(layer, Conv1D)
        else (layer.out_features, layer.in_features)
    )


def is_quantized(layer: nn.Module) -> bool:
    """Is this a linear layer whose weight is codes, ours or bitsandbytes'?"""
    return isinstance(layer, nn.Linear) and (
        not layer.weight.is_floating_point() or hasattr(layer.weight, "quant_state")
    )


def is_packed(layer: nn.Module) -> bool:
    """Is this a layer of our own `qlora`?"""
    return is_quantized(layer) and hasattr(layer, "dequantized")


def shared_weights(model: nn.Module) -> set[int]:
    """The ids of the weights that stand in several places of the model."""
    places = {}  # the children of each module; of a block that is used twice once
    model = uncompiled(model)
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LinearWrapper):
            continue  # its weight is that of its base
        parent, _, child = path.rpartition(".")
        places[id(model.get_submodule(parent)), child] = module
    weights = [
        module.weight for module in places.values() if getattr(module, "weight", None) is not None
    ]
    return {weight for weight, number in Counter(map(id, weights)).items() if number > 1}


def weight_matrix(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as (d_out, d_in), not a copy: of a Conv1D a transposed view.

    Raises CourseError for a quantised layer, whose weight is codes: what is added to it would be
    lost when it is rounded again.
    """
    if is_quantized(layer):
        raise CourseError(
            f"a {type(layer).__name__} is quantised, so its weight is no matrix: take "
            "qlora.dequantized_copy(model) first (Day 4)"
        )
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def replace_layer(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the module called `name` is. Raises CourseError if there is none.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    >>> replace_layer(model, "1", nn.Identity())
    >>> model[1]
    Identity()
    """
    if not name:
        raise CourseError(
            f"a {type(model).__name__} cannot be replaced in itself: put it into "
            "nn.Sequential(layer) first"
        )
    model = uncompiled(model)
    try:
        model.get_submodule(name)
    except AttributeError:
        raise CourseError(
            f"the model has no module called {name!r}: linear_layers(model) lists names"
        ) from None
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    if isinstance(new, LinearWrapper) or is_packed(new):
        refuse_save(model)


def restore(model: nn.Module) -> None:
    """Make a model whose wrapped layers are gone one that is saved and trained as others are; the
    weights of a quantised base stay frozen.
    """
    model = uncompiled(model)
    if not any(map(is_packed, model.modules())):
        vars(model).pop("save_pretrained", None)
    model.requires_grad_(not any(map(is_quantized, model.modules())))


def refuse_save(model: nn.Module) -> None:
    """Let `save_pretrained` say what to do instead, until `restore`."""
    model.save_pretrained = _save_pretrained


def _save_pretrained(*arguments: object, **options: object) -> None:
    """In the place of transformers' own, which would write wrapped layers under names that no model
    reads again.
    """
    raise CourseError(
        "a model with wrapped or packed layers or virtual tokens cannot be saved by "
        "save_pretrained: save_adapter(model, folder) keeps the adapter, "
        "merged_copy(model).save_pretrained(folder) the whole model, if it is packed of a "
        "dequantized_copy(model)"
    )


def default_targets(model: "nn.Module | str") -> Targets:
    """The layers that LoRA adapts by default in a model, or in models of a `model_type`: peft's, or
    else the copied table's.

    Raises CourseError for a family that neither knows, and lists the names to choose from.

    >>> default_targets("llama"), default_targets("baichuan")
    (['q_proj', 'v_proj'], ['W_pack'])
    """
    family = (
        model
        if isinstance(model, str)
        else getattr(getattr(model, "config", None), "model_type", "")
    )
    known = COPIED_TARGETS | _peft_targets()
    if family in known:
        # the list of peft stays as it is
        return known[family] if isinstance(known[family], str) else list(known[family])
    choice = (
        f"one of {', '.join(known)}"
        if isinstance(model, str)
        else f"targets, a list of some of {_names(model)}"
    )
    raise CourseError(f"no default targets are known for models of type {family!r}: give {choice}")


def target_table() -> list[dict[str, str]]:
    """A row a family: what the copied table says, what peft says, and which of them
    `default_targets` uses.
    """
    peft = _peft_targets()
    rows = []
    for family in COPIED_TARGETS | peft:
        copied, mapped = COPIED_TARGETS.get(family), peft.get(family)
        used = "peft" if mapped else "table"
        if copied and mapped:
            used = "both agree" if set(copied) == set(mapped) else "peft; they disagree"
        rows.append(
            {
                "model type": family,
                "copied table": _joined(copied),
                "peft": _joined(mapped),
                "used": used,
            }
        )
    return rows


def _joined(targets: Targets | None) -> str:
    return targets if isinstance(targets, str) else ", ".join(targets or ())


def _peft_targets() -> dict[str, Targets]:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    return TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


def count_parameters(model: nn.Module) -> Count:
    """Weights that train, and all; a matrix used twice (tied embeddings) counts once, two codes in
    a byte as two.

    >>> print(count_parameters(nn.Linear(9, 10).requires_grad_(False)))
    0 of 100 weights train (0.0000%)
    """
    packed = {
        id(layer.weight): layer.out_features * layer.in_features
        for layer in model.modules()
        if is_quantized(layer)
    }
    counts = [
        (packed.get(id(weight), weight.numel()), weight.requires_grad)
        for weight in model.parameters()
    ]
    return Count(
        sum(number for number, trains in counts if trains), sum(number for number, _ in counts)
    )


def lora_parameters(shapes: Iterable[tuple[int, int]], rank: int) -> int:
    """Weights that LoRA adds to layers of these shapes (d_out, d_in): r (d_in + d_out) each.

    GPT-3 has 96 layers of width 12,288; with q and v adapted at rank 1, as in the paper's table 4:

    >>> lora_parameters([(12_288, 12_288)] * 2 * 96, rank=1)
    4718592
    """
    return sum(rank * (d_in + d_out) for d_out, d_in in shapes)


def empty_model(source: "PreTrainedConfig | Path | str") -> "PreTrainedModel":
    """A causal language model with shapes but without weights (on the meta device): to count in,
    whatever its size.

    source: a transformers config, or the name of a course model, a folder, or a Hub id, of which
        only config.json is read

    Raises CourseError if that cannot be had, or describes another kind of model. Code that comes
    with a config is not run.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(str(source)) if isinstance(source, str | Path) else source
    try:
        with torch.device("meta"), quiet_transformers():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a config makes a library do
        found = f"a {type(config).__name__} makes no causal language model ({first_line(error)})"
        raise CourseError(f"{found}: give the transformers config of one") from None


def read_config(name: str) -> "PreTrainedConfig":
    """The config of a course model, of a folder, or of a Hub id, of which only config.json is read.
    Raises CourseError if it cannot be had or read.
    """
    from transformers import AutoConfig

    folders = {
        "tiny": models.tiny_folder,
        "smollm2-135m": lambda: models.unpacked_smollm2(verify=False),
    }
    source = (
        folders[name]()
        if name in folders
        else models.BASES[name].hub_id
        if name in models.BASES
        else name
    )
    try:
        folder = (
            Path(source)
            if Path(source).is_dir()
            else hub.cached(source) or hub.download(source, ["config.json"])
        )
        with quiet_transformers():
            return AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except CourseError:
        raise
    except Exception as error:  # whatever a config makes a library do
        raise CourseError(
            f"the config of {name!r} cannot be used ({first_line(error)}): give a transformers "
            "config"
        ) from None
