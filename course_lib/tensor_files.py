"""A folder with a config and tensors, such as an adapter: written whole or not at all, read
strictly.

    adapter_config.json            what it is, and its sizes
    adapter_model.safetensors      tensors by name

The names of the files are peft's. A folder written here is sealed as well; peft ignores the seal.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from course_lib import sealing
from course_lib.runtime import CourseError, first_line

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def publish(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the two files into `folder`, in the place of an adapter or of nothing.

    Raises CourseError if `folder` holds anything else, or cannot be written, and for a tensor that
    is not finite.
    """
    for name, value in tensors.items():
        if not value.isfinite().all():
            advice = "train again at a lower learning rate, or save it as float32"
            name = name.removeprefix("base_model.model.")
            raise CourseError(f"{name} is not finite, so it is of no use: {advice}")
    try:
        sealing.recover(folder)
        if folder == Path.cwd():
            advice = "choose a new folder in it"
            raise CourseError(
                f"{folder} is the working folder, which a save would replace: {advice}"
            )
        ours = (CONFIG, WEIGHTS, sealing.SEAL)
        if folder.exists() and not all(
            path.is_file() and path.name in ours for path in folder.iterdir()
        ):
            raise CourseError(f"{folder} holds something else than an adapter: choose a new folder")
        partial = sealing.partial_folder(folder)
        try:
            text = json.dumps(settings, indent=2) + "\n"
            (partial / CONFIG).write_text(text, encoding="utf-8")
            # copies, since safetensors refuses a transposed or a shared matrix
            copies = {
                key: value.detach().clone(memory_format=torch.contiguous_format)
                for key, value in tensors.items()
            }
            save_file(copies, partial / WEIGHTS, metadata={"format": "pt"})
            sealing.publish(partial, folder, {})
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        megabytes = sum(value.nbytes for value in tensors.values()) / 1e6
        found = f"{folder} cannot be written ({first_line(error)}; {megabytes:.1f} MB)"
        raise CourseError(f"{found}: choose another folder") from None


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors. Raises CourseError for what is missing or damaged, and for a
    tensor that is not finite.
    """
    if not os.path.exists(folder):  # a save was killed, or is between its two renames
        sealing.recover(folder)
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
    if not isinstance(settings, dict):
        settings = {}
    for name, tensor in tensors.items():
        if not tensor.float().isfinite().all():
            advice = "get it again, or train again at a lower learning rate"
            raise CourseError(f"the adapter in {folder} holds NaN or infinity in {name}: {advice}")
    return settings, tensors
