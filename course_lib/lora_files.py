"""LoRA and AdaLoRA as files in peft's format, by way of `adapter_files`.

    adapter_config.json            rank, alpha, names of the layers
    adapter_model.safetensors      base_model.model.<layer>.lora_A.weight (r, d_in),
                                   base_model.model.<layer>.lora_B.weight (d_out, r)

Of AdaLoRA the matrices are lora_A (Q), lora_B (P) and lora_E (the singular values), of each layer
those triplets that are left; the config's `rank_pattern` says which of the first ones they are.

What trains beside the matrices is kept, too: whole modules (embeddings, norms, a head) as peft's
`modules_to_save`, new rows of the embeddings as its `trainable_token_indices`.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from course_lib import models, surgery
from course_lib.adalora import SVDLinear, adalora_layers, add_adalora
from course_lib.lora import LowRank, adapter_names, add_lora, lora_layers, trained_beside
from course_lib.runtime import CourseError
from course_lib.surgery import LinearWrapper
from course_lib.tensor_files import CONFIG
from course_lib.vocabulary import mark_rows, trained_rows

PREFIX = "base_model.model."
MATRIX = {
    "LORA": re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight"),
    "ADALORA": re.compile(r"base_model\.model\.(.+)\.lora_([ABE])"),
}
ROWS = re.compile(r"base_model\.model\.(.+)\.token_adapter\.trainable_tokens_delta")
WHOLE = re.compile(  # peft keeps the matrix under its new rows, too, where a vocabulary has grown
    r"base_model\.model\.(?!.*lora_)(.+?)(?:\.token_adapter\.base_layer)?\.(weight|bias)"
)
KNOWN_SETTINGS = set(  # any other that is set would make the adapter more than LoRA or AdaLoRA
    "peft_type r lora_alpha use_rslora target_modules exclude_modules layers_to_transform "
    "layers_pattern init_lora_weights modules_to_save trainable_token_indices ensure_weight_tying "
    "lora_dropout bias fan_in_fan_out task_type inference_mode base_model_name_or_path revision "
    "peft_version auto_mapping megatron_core qalora_group_size".split()
)
OF_ADALORA = set(
    "init_r target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step "
    "rank_pattern".split()
)


@dataclass(frozen=True)
class LoRAFile:
    """What a folder holds, by names in the base.

    matrices: (layer, "A" or "B"; of AdaLoRA "E", too); whole: (module, "weight" or "bias"); rows:
    module -> the rows `ids` of its weight
    """

    settings: dict[str, Any]
    matrices: dict[tuple[str, str], Tensor]
    whole: dict[tuple[str, str], Tensor]
    rows: dict[str, Tensor]

    @property
    def is_adalora(self) -> bool:
        return self.settings["peft_type"] == "ADALORA"

    def live(self, path: str) -> Tensor:
        """(rank,) bool: of the triplets that a layer of AdaLoRA started with, those in the file."""
        pattern = self.settings.get("rank_pattern") or {}
        return torch.tensor(pattern.get(f"{path}.lora_E", [True] * self.settings["init_r"]))

    def shapes(self, path: str, d_out: int, d_in: int) -> dict[str, tuple[int, int]]:
        """What the matrices of a layer should be."""
        rank = int(self.live(path).sum()) if self.is_adalora else self.settings["r"]
        shapes = {"A": (rank, d_in), "B": (d_out, rank)}
        return shapes | {"E": (rank, 1)} if self.is_adalora else shapes

    def ids(self, module: str) -> list[int]:
        """The token ids of the rows of `module`; a list in the config is of the embeddings."""
        found = self.settings.get("trainable_token_indices") or []
        if isinstance(found, dict):
            names = [name for name in found if f".{module}".endswith(f".{name}")]
            found = found[names[0]] if names else next(iter(found.values()))  # a tied head
        return list(found)


def described(
    model: nn.Module, name: str, dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of the adapter `name`, and of what trains beside its matrices, which
    alone get this type.
    """
    settings, tensors = _three_factors(model) or _two_factors(model, name)
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    whole, rows = _beside(model)
    tensors |= {f"{PREFIX}{module}.{part}": value for (module, part), value in whole.items()}
    tensors |= {
        f"{PREFIX}{module}.token_adapter.trainable_tokens_delta": value[ids]
        for module, (ids, value) in rows.items()
    }
    settings["modules_to_save"] = sorted({module for module, _ in whole}) or None
    settings["trainable_token_indices"] = {module: ids for module, (ids, _) in rows.items()} or None
    return settings, tensors


def _two_factors(model: nn.Module, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and matrices of the LoRA adapter `name`."""
    layers = lora_layers(model, name)
    updates = {path: layer.adapters[name] for path, layer in layers.items()}
    _check_equal_sizes(updates.values(), name)
    update = next(iter(updates.values()))
    settings = _settings(model, layers) | {
        "peft_type": "LORA",
        "r": update.rank,
        "lora_alpha": update.alpha,
        "use_rslora": update.rank_stabilized,
    }
    return settings, {
        f"{PREFIX}{path}.lora_{letter}.weight": getattr(update, letter)
        for path, update in updates.items()
        for letter in "AB"
    }


def _three_factors(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Config and matrices of the AdaLoRA adapter, None if there is none. The schedule is not the
    adapter's, so the config gets the shortest that peft takes, and the ranks as they are.
    """
    layers = adalora_layers(model)
    if not layers:
        return None
    _check_equal_sizes(layers.values(), "default")
    layer, live = next(iter(layers.values())), {path: one.live for path, one in layers.items()}
    settings = _settings(model, layers) | {
        "peft_type": "ADALORA",
        "init_r": layer.rank,
        "target_r": math.ceil(sum(mask.sum().item() for mask in live.values()) / len(layers)),
        "lora_alpha": layer.alpha,
        "total_step": 1,
        "rank_pattern": {f"{path}.lora_E": mask.tolist() for path, mask in live.items()},
    }
    tensors = {}
    for path, layer in layers.items():
        tensors[f"{PREFIX}{path}.lora_A"] = layer.Q[live[path]]
        tensors[f"{PREFIX}{path}.lora_B"] = layer.P[:, live[path]]
        tensors[f"{PREFIX}{path}.lora_E"] = layer.singular[live[path], None]
    return settings, tensors


def _check_equal_sizes(updates: Iterable[LowRank | SVDLinear], name: str) -> None:
    sizes = {(update.rank, update.alpha, update.scale) for update in updates}
    if len(sizes) > 1:
        found = " and ".join(f"rank {rank}, alpha {alpha}" for rank, alpha, _ in sorted(sizes)[:2])
        advice = "expected them equal: keep its state_dict instead"
        raise CourseError(f"the layers of adapter {name!r} differ ({found}), {advice}")


def _beside(
    model: nn.Module,
) -> tuple[dict[tuple[str, str], Tensor], dict[str, tuple[list[int], Tensor]]]:
    """What trains beside the matrices: whole modules, (module, "weight" or "bias") -> tensor, and
    rows of a weight, module -> (ids, weight).
    """
    model = surgery.uncompiled(model)
    whole: dict[tuple[str, str], Tensor] = {}
    rows: dict[str, tuple[list[int], Tensor]] = {}
    wrappers = [path for path, one in model.named_modules() if isinstance(one, LinearWrapper)]
    updates = {
        id(weight)
        for layer in lora_layers(model).values()
        for weight in layer.adapters.parameters()
    }
    updates |= {
        id(weight)
        for layer in adalora_layers(model).values()
        for weight in layer.parameters(recurse=False)
    }
    for path, module in model.named_modules(remove_duplicate=False):
        own = dict(module.named_parameters(recurse=False))
        ids = trained_rows(own["weight"]) if "weight" in own else None
        trained = [
            part
            for part, weight in own.items()
            if weight.requires_grad and id(weight) not in updates
        ]
        if ids is not None and not own["weight"].requires_grad:
            if all(own["weight"] is not weight for _, weight in rows.values()):  # tied: once
                rows[path] = (ids, own["weight"])
        elif trained:
            if own.keys() - {"weight", "bias"} or any(
                path.startswith(f"{wrapper}.") for wrapper in wrappers
            ):
                found = f"{path}.{trained[0]} trains, and peft's format has no place for it"
                raise CourseError(f"{found}: freeze it, or keep the model's state_dict instead")
            whole |= {(path, part): weight for part, weight in own.items()}
    return whole, rows


def _settings(model: nn.Module, layers: Mapping[str, LinearWrapper]) -> dict[str, Any]:
    """What the configs of both share."""
    return shared_settings(model) | {
        "target_modules": brief_names(layers, surgery.linear_layers(model)),
        "fan_in_fan_out": all(isinstance(layer.base, Conv1D) for layer in layers.values()),
    }


def shared_settings(model: nn.Module) -> dict[str, Any]:
    """What all configs have."""
    return {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _name_of(model),
        "inference_mode": True,
    }


def brief_names(chosen: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of the names, as briefly as leaves no doubt: peft compares their ends.

    >>> brief_names(["0.q", "1.q"], ["0.q", "1.q", "1.k"]), brief_names(["0.q"], ["0.q", "1.q"])
    (['q'], ['0.q'])
    """
    chosen = list(chosen)
    ends = {path.rpartition(".")[2] for path in chosen}
    meant = {path for path in names if path.rpartition(".")[2] in ends}
    return sorted(ends) if meant == set(chosen) else chosen


def _name_of(model: nn.Module) -> str | None:
    """The public name of the base, or None: a path of this machine is no name."""
    name = getattr(getattr(model, "config", None), "name_or_path", None) or ""
    local = (
        os.path.isabs(name) or name.startswith((".", "~")) or "\\" in name or Path(name).exists()
    )
    return models.public_name(name) if local else name or None


def load(
    model: nn.Module,
    folder: Path,
    settings: dict[str, Any],
    tensors: Mapping[str, Tensor],
    name: str,
    say: Callable[[str], None],
) -> None:
    """Add what the files in `folder` hold. Raises CourseError before anything is changed."""
    file = _read(folder, settings, tensors)
    paths = {path for path, _ in file.matrices}
    _check_fit(model, file, folder)
    _check_alone(model, file, folder)
    expected = named_layers(model, settings)
    exactly = "|".join(map(re.escape, paths))
    with torch.no_grad():
        if file.is_adalora:
            _add_three_factors(model, file, exactly)
        else:
            _add_two_factors(model, file, exactly, name)
        _put_beside(surgery.uncompiled(model), file)
    if left := expected - paths:
        part = f"{len(paths)} of the {len(expected)} layers that its config names"
        say(f"the adapter in {folder} covers {part}; {min(left)} stays as the base has it")
    if settings.get("lora_dropout"):
        found = f"the adapter in {folder} was trained with dropout {settings['lora_dropout']}"
        say(f"{found}; it computes the same here, but trains on without")


def _add_two_factors(model: nn.Module, file: LoRAFile, targets: str, name: str) -> None:
    rank, alpha, stabilized = (file.settings.get(key) for key in ("r", "lora_alpha", "use_rslora"))
    add_lora(model, rank, alpha, targets, name=name, rank_stabilized=bool(stabilized))
    for path, layer in lora_layers(model, name).items():
        layer.adapters[name].A.copy_(file.matrices[path, "A"])
        layer.adapters[name].B.copy_(file.matrices[path, "B"])


def _add_three_factors(model: nn.Module, file: LoRAFile, targets: str) -> None:
    """The triplets of the file in their places among those of the start, zeros in the others."""
    add_adalora(model, file.settings["init_r"], file.settings["lora_alpha"], targets)
    for path, layer in adalora_layers(model).items():
        live = file.live(path).to(layer.pruned.device)
        layer.pruned.copy_(~live)
        for weight in (layer.P, layer.Q):
            weight.zero_()
        layer.Q[live] = file.matrices[path, "A"].to(layer.Q)
        layer.P[:, live] = file.matrices[path, "B"].to(layer.P)
        layer.singular[live] = file.matrices[path, "E"][:, 0].to(layer.singular)
    model.requires_grad_(False)


def _check_alone(model: nn.Module, file: LoRAFile, folder: Path) -> None:
    """Raise CourseError if two adapters would share the weights beside their matrices."""
    others = adapter_names(model)
    beside = trained_beside(model) or [f"{module}.weight" for module in file.rows]
    beside += [f"{module}.{part}" for module, part in file.whole]
    if others and beside:
        found = f"adapter {others[0]!r} is there, and a model has only one {beside[0]}"
        raise CourseError(
            f"the adapter in {folder} needs a base of its own ({found}): load it again"
        )


def _check_fit(model: nn.Module, file: LoRAFile, folder: Path) -> None:
    """Raise CourseError if the model has no place for a tensor of the file."""
    base = file.settings.get("base_model_name_or_path") or "not named"
    layers = surgery.linear_layers(model)
    for path in sorted({path for path, _ in file.matrices}):
        if path not in layers:
            found = f"this model has no linear layer {path}"
            raise CourseError(f"the adapter in {folder} is for another base ({base}): {found}")
        d_out, d_in = surgery.layer_shape(layers[path])
        for letter, expected in file.shapes(path, d_out, d_in).items():
            matrix = file.matrices.get((path, letter))
            found = "missing" if matrix is None else tuple(matrix.shape)
            if found != expected:
                whose = f"{letter} of {path} is {found}, expected {expected}"
                advice = f"load the base it was trained on ({base})"
                raise CourseError(f"the adapter in {folder} does not fit: {whose}; {advice}")
    parts = {f"{module}.{part}": tensor for (module, part), tensor in file.whole.items()}
    weights = dict(surgery.uncompiled(model).named_parameters(remove_duplicate=False))
    weights |= {name.replace(".base.", "."): weight for name, weight in weights.items()}
    for path in [*parts, *(f"{module}.weight" for module in file.rows)]:
        if path not in weights:
            found = f"this model has no weight {path}"
            raise CourseError(f"the adapter in {folder} is for another base ({base}): {found}")
    for path, tensor in parts.items():
        found, expected = tuple(tensor.shape), tuple(weights[path].shape)
        if found != expected:
            advice = "give the model as many rows first, by add_pieces or resize_token_embeddings"
            if found[1:] != expected[1:] or len(found) == 1:
                advice = f"load the base it was trained on ({base})"
            whose = f"{path} is {found}, expected {expected}"
            raise CourseError(f"the adapter in {folder} does not fit: {whose}; {advice}")
    for module, rows in file.rows.items():
        ids, there = file.ids(module), weights[f"{module}.weight"]
        if len(ids) != len(rows) or rows.shape[1:] != there.shape[1:]:
            found = f"{len(rows)} rows of {module} for {len(ids)} tokens"
            raise CourseError(f"the adapter in {folder} is damaged ({found}): get it again")
        if max(ids) >= len(there):
            found = f"{module} has {len(there)} rows, and the file one for token {max(ids)}"
            advice = "add its tokens first, with add_pieces or resize_token_embeddings"
            raise CourseError(f"the adapter in {folder} does not fit: {found}: {advice}")


def _put_beside(model: nn.Module, file: LoRAFile) -> None:
    """Put the tensors beside the matrices into the model; they train."""
    _untie(model, file.whole)
    for (path, part), tensor in file.whole.items():
        weight = getattr(model.get_submodule(path), part)
        weight.copy_(tensor)
        weight.requires_grad_(weight.is_floating_point())
    for path, rows in file.rows.items():
        weight, ids = model.get_submodule(path).weight, file.ids(path)
        weight[ids] = rows.to(weight)
        mark_rows(weight, ids)


def _untie(model: nn.Module, whole: Mapping[tuple[str, str], Tensor]) -> None:
    """Give the head a matrix of its own if the file has another one for it than for the embeddings,
    as peft does when it keeps one of the two.
    """
    if not hasattr(model, "get_output_embeddings"):
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    kept = {
        id(module): whole[path, "weight"]
        for path, module in model.named_modules()
        if (path, "weight") in whole
    }
    matrices = [kept.get(id(module)) for module in (embedding, head)]
    if any(one is not None for one in matrices):
        if all(one is not None for one in matrices) and torch.equal(*matrices):
            return
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def named_layers(model: nn.Module, settings: Mapping[str, Any]) -> set[str]:
    """The layers that the config names by its targets alone; none where it says more about them."""
    targets = settings.get("target_modules")
    if not targets or settings.get("layers_to_transform") or settings.get("exclude_modules"):
        return set()
    try:
        return set(surgery.find_layers(model, targets))
    except CourseError:  # a target that this family has not
        return set()


def _read(folder: Path, settings: dict[str, Any], tensors: Mapping[str, Tensor]) -> LoRAFile:
    """The files. Raises CourseError for what is more than LoRA."""
    kind = settings["peft_type"]
    key = "init_r" if kind == "ADALORA" else "r"
    if not {key, "lora_alpha"} <= settings.keys():
        raise CourseError(
            f"{folder / CONFIG} does not describe LoRA: expected peft_type LORA, r and lora_alpha; "
            "or ADALORA, init_r and lora_alpha"
        )
    rank, alpha = settings[key], settings["lora_alpha"]
    if type(rank) is not int or not isinstance(alpha, int | float):
        found = f"{folder / CONFIG} has {key}={rank!r} and lora_alpha={alpha!r}"
        raise CourseError(
            f"{found}, expected a whole number and a number: save or download it again"
        )
    if kind == "ADALORA":
        _check_pattern(settings.get("rank_pattern"), rank, folder)
    known = KNOWN_SETTINGS | OF_ADALORA if kind == "ADALORA" else KNOWN_SETTINGS
    more = [setting for setting, value in settings.items() if value and setting not in known]
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian"):
        # most others change the base as well
        more.append(f"init_lora_weights={settings['init_lora_weights']}")
    if settings.get("bias") not in (None, "none"):
        more.append(f"bias={settings['bias']}")
    targets = settings.get("target_modules")
    if not isinstance(targets, str | list | None):
        found = f"{folder / CONFIG} has target_modules={targets!r}"
        raise CourseError(f"{found}, expected names of layers: save or download it again")
    file = LoRAFile(settings, {}, {}, {})
    for key, tensor in tensors.items():
        if match := MATRIX[kind].fullmatch(key):
            file.matrices[match.groups()] = tensor
        elif match := ROWS.fullmatch(key):
            file.rows[match[1]] = tensor
        elif (match := WHOLE.fullmatch(key)) and ".base_layer" not in match[1]:
            file.whole[match.groups()] = tensor
        else:
            more.append(key)
    if more or not file.matrices:
        found = more[0] if more else "no weights"
        raise CourseError(f"the adapter in {folder} is not plain LoRA ({found}): load it with peft")
    for module in settings.get("modules_to_save") or ():
        if not any(f".{path}".endswith(f".{module}") for path, _ in file.whole):
            found = f"its config names {module}, and it holds no weights of it"
            raise CourseError(f"the adapter in {folder} is damaged ({found}): get it again")
    if settings.get("trainable_token_indices") and not (file.rows or file.whole):
        found = "its config names rows of tokens, and it holds none"
        raise CourseError(f"the adapter in {folder} is damaged ({found}): get it again")
    return file


def _check_pattern(pattern: object, rank: int, folder: Path) -> None:
    """Raise CourseError if it does not say of each of `rank` triplets whether it is there."""
    if pattern is None:
        return
    if not isinstance(pattern, dict) or not all(
        isinstance(mask, list) and len(mask) == rank and {*map(type, mask)} <= {bool}
        for mask in pattern.values()
    ):
        expected = f"expected {rank} truth values a layer: save or download it again"
        raise CourseError(f"{folder / CONFIG} has another rank_pattern, {expected}")
