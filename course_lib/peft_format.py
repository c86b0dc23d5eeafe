"""Adapters as files in peft's format: `PeftModel.from_pretrained` reads them, and we read peft's.

    adapter_config.json            rank, alpha, names of the layers
    adapter_model.safetensors      base_model.model.<layer>.lora_A.weight (r, d_in),
                                   base_model.model.<layer>.lora_B.weight (d_out, r)

A folder written here is sealed as well; peft ignores the seal. A base with the same layers and
other weights cannot be told from the right one, because the format keeps only its name.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from course_lib import sealing, surgery
from course_lib.lora import LoRALinear, add_lora, lora_layers
from course_lib.runtime import CourseError, first_line

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WEIGHT_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
KNOWN_SETTINGS = set(  # any other that is set would make the adapter more than LoRA
    "peft_type r lora_alpha use_rslora target_modules exclude_modules layers_to_transform "
    "layers_pattern init_lora_weights "
    "lora_dropout bias fan_in_fan_out task_type inference_mode base_model_name_or_path revision "
    "peft_version auto_mapping "
    "megatron_core qalora_group_size".split()
)


def save_adapter(model: nn.Module, folder: Path | str, name: str = "default") -> None:
    """Write the adapter `name` of `model`, whole or not at all; an adapter that lies in `folder` is
    replaced.

    Raises CourseError if `folder` holds anything else, or cannot be written, and for an adapter
    whose layers differ in rank or alpha, since the format keeps one number of each.
    """
    folder = Path(folder).expanduser().resolve()
    layers = lora_layers(model, name)
    sizes = {
        (update.rank, update.alpha, update.rank_stabilized)
        for update in (layer.adapters[name] for layer in layers.values())
    }
    if len(sizes) > 1:
        found = " and ".join(f"rank {rank}, alpha {alpha}" for rank, alpha, _ in sorted(sizes)[:2])
        raise CourseError(
            f"the layers of adapter {name!r} differ ({found}), expected them equal: keep its "
            "state_dict instead"
        )
    weights = {  # copies, since safetensors refuses a transposed or a shared matrix
        f"base_model.model.{path}.lora_{letter}.weight": getattr(layer.adapters[name], letter)
        .detach()
        .clone(memory_format=torch.contiguous_format)
        for path, layer in layers.items()
        for letter in "AB"
    }
    try:
        if folder == Path.cwd():
            raise CourseError(
                f"{folder} is the working folder, which a save would replace: choose a new folder "
                "in it"
            )
        ours = (CONFIG, WEIGHTS, sealing.SEAL)
        if folder.exists() and not all(
            path.is_file() and path.name in ours for path in folder.iterdir()
        ):
            raise CourseError(f"{folder} holds something else than an adapter: choose a new folder")
        partial = sealing.partial_folder(folder)
        try:
            (partial / CONFIG).write_text(
                json.dumps(_settings(model, layers, name), indent=2) + "\n", encoding="utf-8"
            )
            save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
            sealing.publish(partial, folder, {})
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        megabytes = sum(weight.nbytes for weight in weights.values()) / 1e6
        raise CourseError(
            f"{folder} cannot be written ({first_line(error)}; {megabytes:.1f} MB): choose another "
            "folder"
        ) from None


def _settings(model: nn.Module, layers: Mapping[str, LoRALinear], name: str) -> dict[str, Any]:
    """The config; its layers are named as briefly as leaves no doubt."""
    ends = sorted({path.rpartition(".")[2] for path in layers})
    update = next(iter(layers.values())).adapters[name]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None),
        "r": update.rank,
        "lora_alpha": update.alpha,
        "use_rslora": update.rank_stabilized,
        "target_modules": ends
        if surgery.find_layers(model, ends).keys() == layers.keys()
        else list(layers),
        "fan_in_fan_out": all(isinstance(layer.base, Conv1D) for layer in layers.values()),
        "inference_mode": True,
    }


def load_adapter(model: nn.Module, folder: Path | str, name: str = "default") -> None:
    """Add the adapter in `folder` to `model`; it is then the one in use, and can be trained on.

    Raises CourseError before anything is changed, if the files are missing, damaged or more than
    LoRA, or if `model` has no such layers.
    """
    folder = Path(folder).expanduser()
    settings, weights = _read(folder)
    layers, paths = surgery.linear_layers(model), {path for path, _ in weights}
    rank, base = settings["r"], settings.get("base_model_name_or_path") or "not named"
    for path in sorted(paths):
        if path not in layers:
            raise CourseError(
                f"the adapter in {folder} is for another base ({base}): this model has no linear "
                f"layer {path}"
            )
        d_out, d_in = surgery.layer_shape(layers[path])
        for letter, expected in (("A", (rank, d_in)), ("B", (d_out, rank))):
            found = tuple(weights[path, letter].shape) if (path, letter) in weights else "missing"
            if found != expected:
                whose = f"{letter} of {path} is {found}, expected {expected}"
                raise CourseError(
                    f"the adapter in {folder} does not fit: {whose}; load the base it was trained "
                    f"on ({base})"
                )
    exactly = "|".join(map(re.escape, paths))
    add_lora(
        model,
        rank,
        settings["lora_alpha"],
        exactly,
        name=name,
        rank_stabilized=bool(settings.get("use_rslora")),
    )
    with torch.no_grad():
        for path, layer in lora_layers(model, name).items():
            layer.adapters[name].A.copy_(weights[path, "A"])
            layer.adapters[name].B.copy_(weights[path, "B"])


def _read(folder: Path) -> tuple[dict[str, Any], dict[tuple[str, str], Tensor]]:
    """The config, and the matrices by (name of the layer, "A" or "B")."""
    # False where it may not look
    if os.path.isfile(folder / "adapter_model.bin") and not os.path.isfile(folder / WEIGHTS):
        raise CourseError(
            f"{folder} holds a pickle, which can run code when it is read: ask for the adapter as "
            f"{WEIGHTS}"
        )
    for file in (CONFIG, WEIGHTS):
        if not os.path.isfile(folder / file):
            raise CourseError(
                f"{folder} holds no {file}: give a folder that save_adapter or peft wrote"
            )
    try:
        if (folder / sealing.SEAL).exists():
            sealing.check(folder, others=("README.md",))
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except sealing.DamagedError as error:
        advice = f"save it again, or delete {sealing.SEAL} if another program changed it on purpose"
        raise CourseError(f"the adapter is damaged ({error}): {advice}") from None
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CourseError(
            f"the adapter in {folder} is damaged ({first_line(error)}): save or download it again"
        ) from None
    if (
        not isinstance(settings, dict)
        or settings.get("peft_type") != "LORA"
        or not {"r", "lora_alpha"} <= settings.keys()
    ):
        raise CourseError(
            f"{folder / CONFIG} does not describe LoRA: expected peft_type LORA, r and lora_alpha"
        )
    rank, alpha = settings["r"], settings["lora_alpha"]
    if type(rank) is not int or not isinstance(alpha, int | float):
        found = f"{folder / CONFIG} has r={rank!r} and lora_alpha={alpha!r}"
        raise CourseError(
            f"{found}, expected a whole number and a number: save or download it again"
        )
    matches = {name: WEIGHT_NAME.fullmatch(name) for name in tensors}
    more = [
        setting for setting, value in settings.items() if value and setting not in KNOWN_SETTINGS
    ]
    more += [name for name, match in matches.items() if match is None]
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian"):
        # most others change the base as well
        more.append(f"init_lora_weights={settings['init_lora_weights']}")
    if more or not tensors:
        raise CourseError(
            f"the adapter in {folder} is not plain LoRA ({more[0] if more else 'no weights'}): "
            "load it with peft"
        )
    return settings, {match.groups(): tensors[name] for name, match in matches.items()}
