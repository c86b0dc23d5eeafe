"""Shapes of known models, so that they can be planned for without a network, and sizes of GPUs.

A shape is what config.json says: width, blocks, heads, vocabulary. Each one is checked by the
number of weights it makes (tests/test_shapes.py), which the models' own pages print.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from course_lib import models
from course_lib.runtime import CourseError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

GIB = 2**30
LONGEST_NAME = 200
MOST_GB = 1000  # of a card; a larger number is part of a name
NO_BF16 = ("t4", "p100", "v100")  # capability below 8.0

# family, vocabulary, width, feed-forward width, blocks, heads, heads of keys and values, head tied,
# and the tokens that it reads at once
SHAPES = {
    "llama-7b": ("llama", 32_000, 4096, 11_008, 32, 32, 32, False, 2048),
    "llama-13b": ("llama", 32_000, 5120, 13_824, 40, 40, 40, False, 2048),
    "llama-33b": ("llama", 32_000, 6656, 17_920, 60, 52, 52, False, 2048),
    "llama-65b": ("llama", 32_000, 8192, 22_016, 80, 64, 64, False, 2048),
    "llama-2-7b": ("llama", 32_000, 4096, 11_008, 32, 32, 32, False, 4096),
    "llama-2-13b": ("llama", 32_000, 5120, 13_824, 40, 40, 40, False, 4096),
    "llama-2-70b": ("llama", 32_000, 8192, 28_672, 80, 64, 8, False, 4096),
    "llama-3.1-8b": ("llama", 128_256, 4096, 14_336, 32, 32, 8, False, 131_072),
    "llama-3.2-1b": ("llama", 128_256, 2048, 8192, 16, 32, 8, True, 131_072),
    "llama-3.2-3b": ("llama", 128_256, 3072, 8192, 28, 24, 8, True, 131_072),
    "falcon-7b": ("falcon", 65_024, 4544, 18_176, 32, 71, 1, True, 2048),
    "mistral-7b": ("mistral", 32_000, 4096, 14_336, 32, 32, 8, False, 32_768),
    "qwen2.5-0.5b": ("qwen2", 151_936, 896, 4864, 24, 14, 2, True, 32_768),
    "qwen2.5-1.5b": ("qwen2", 151_936, 1536, 8960, 28, 12, 2, True, 32_768),
    "qwen2.5-3b": ("qwen2", 151_936, 2048, 11_008, 36, 16, 2, True, 32_768),
    "qwen2.5-7b": ("qwen2", 152_064, 3584, 18_944, 28, 28, 4, False, 32_768),
    "qwen2.5-14b": ("qwen2", 152_064, 5120, 13_824, 48, 40, 8, False, 32_768),
    "qwen2.5-32b": ("qwen2", 152_064, 5120, 27_648, 64, 40, 8, False, 32_768),
    "qwen2.5-72b": ("qwen2", 152_064, 8192, 29_568, 80, 64, 8, False, 32_768),
    "yi-6b": ("llama", 64_000, 4096, 11_008, 32, 32, 4, False, 4096),
    "yi-1.5-6b": ("llama", 64_000, 4096, 11_008, 32, 32, 4, False, 4096),
    "tinyllama-1.1b": ("llama", 32_000, 2048, 5632, 22, 32, 4, False, 2048),
    "smollm2-135m": ("llama", 49_152, 576, 1536, 30, 9, 3, True, 8192),
    "smollm2-360m": ("llama", 49_152, 960, 2560, 32, 15, 5, True, 8192),
    "smollm2-1.7b": ("llama", 49_152, 2048, 8192, 24, 32, 32, True, 8192),
}

# GiB that torch finds, less than what the card's name says: of the T4 and the RTX 4090 as in error
# messages that people post (CatVTON issue 133, VGen issue 104), rounded down; of the others in the
# same proportion, a twelfth less for cards with ECC in the same memory (T4, L4, A10, L40S)
GPUS = {
    "rtx-3060": 11.8,
    "t4": 14.5,
    "p100": 15.7,
    "v100": 15.7,
    "l4": 22.0,
    "a10": 21.9,
    "rtx-3090": 23.6,
    "rtx-4090": 23.6,
    "rtx-5090": 31.5,
    "a100-40": 39.3,
    "l40s": 44.0,
    "a100-80": 78.8,
    "h100": 78.8,
    "h200": 138.8,
}


def config_of(name: str) -> "PreTrainedConfig":
    """The transformers config of a named model, of a folder with config.json, or of a Hub id
    (owner/name), whose config.json alone is read.

    Raises CourseError for an unknown name, with those that are nearest.

    >>> config_of("llama-2-70b").num_key_value_heads
    8
    """
    from course_lib.surgery import read_config

    known = SHAPES.get(name.lower())
    if known:
        return _made(*known)
    folder = Path(name).expanduser() if len(name) < LONGEST_NAME else None
    if folder and folder.is_dir():
        return read_config(str(folder))
    if name in models.NAMES or (name.count("/") == 1 and not name.startswith((".", "/", "~"))):
        return read_config(name)
    raise CourseError(
        f"model {name[:LONGEST_NAME]!r} is not known: {_nearest(name, [*SHAPES, 'tiny'])}, "
        "a folder with config.json, or owner/name on the Hub"
    )


def gpu_bytes(gpu: str) -> int:
    """Bytes that torch can use on a GPU of that name, or on one of so many GB, such as "24"; of
    "cpu" this machine's memory.

    >>> gpu_bytes("24"), round(gpu_bytes("t4") / 1e9, 1)
    (24000000000, 15.6)
    """
    name = gpu.strip().lower()
    if name == "cpu":
        import psutil

        return psutil.virtual_memory().total
    if name in GPUS:
        return int(GPUS[name] * GIB)
    number = re.fullmatch(r"(\d+(\.\d+)?) ?(gb)?", name)
    if number and 0.1 <= float(number[1]) <= MOST_GB:
        return int(float(number[1]) * 1e9)
    raise CourseError(
        f"GPU {gpu!r} is not known: {_nearest(name, GPUS)}, or its memory in GB, such as 24"
    )


def one_of(kind: str, name: str, names: Iterable[str]) -> None:
    """Raise CourseError, with the nearest names, if `name` is none of `names`."""
    names = list(names)
    if name not in names:
        raise CourseError(f"{kind} {name!r} is not known: {_nearest(name, names)}")


def _nearest(name: str, names: Iterable[str]) -> str:
    names, part = list(names), name.strip().lower()
    near = [one for one in names if len(part) > 1 and part in one]
    near += [
        one for one in difflib.get_close_matches(part, names, n=3, cutoff=0.4) if one not in near
    ]
    return (
        f"the nearest are {', '.join(near[:4])}" if near else f"expected one of {', '.join(names)}"
    )


def _made(
    family: str,
    vocabulary: int,
    width: int,
    inner: int,
    blocks: int,
    heads: int,
    kv: int,
    tied: bool,
    positions: int,
) -> "PreTrainedConfig":
    from transformers import AutoConfig

    named = {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": blocks}
    named |= {"num_attention_heads": heads, "tie_word_embeddings": tied}
    if family == "falcon":
        return AutoConfig.for_model(family, **named)  # its other numbers are those of Falcon-7B
    return AutoConfig.for_model(
        family,
        **named,
        intermediate_size=inner,
        num_key_value_heads=kv,
        max_position_embeddings=positions,
    )
