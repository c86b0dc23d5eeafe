"""The memory bill of training: bytes of weights, gradients and optimizer states for each parameter.

Activations come on top and depend on batch and length; they are measured, not computed here. Adam keeps two moments in float32.
Sources: ZeRO, Rajbhandari et al. 2019, arXiv 1910.02054, section 3; QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 1.
"""

from dataclasses import dataclass

from course_lib.runtime import CourseError


@dataclass(frozen=True)
class Bill:
    """Bytes for each trained parameter. other: the float32 master copy of mixed precision, or temporary buffers."""

    about: str
    weights: int
    gradients: int
    moments: int
    other: int = 0

    @property
    def bytes_per_parameter(self) -> int:
        return self.weights + self.gradients + self.moments + self.other


BILLS = {
    "bf16": Bill("bf16 weights and gradients, float32 moments, no master copy", weights=2, gradients=2, moments=8),
    "fp32": Bill("everything in float32, as on our CPU", weights=4, gradients=4, moments=8),
    "mixed": Bill("fp16 weights, float32 master copy, gradients and moments", weights=2, gradients=4, moments=8, other=4),
    "fp32+buffers": Bill("float32, with 8 bytes set aside for activations and buffers", weights=4, gradients=4, moments=8, other=8),
}


def training_bytes(parameters: int, bill: str) -> int:
    """Bytes to train `parameters` weights with Adam, without activations; `bill` is a key of BILLS.

    >>> training_bytes(1_000_000_000, "fp32+buffers")
    24000000000
    """
    if bill not in BILLS:
        raise CourseError(f"bill {bill!r} is not known, expected one of {', '.join(BILLS)}")
    return parameters * BILLS[bill].bytes_per_parameter
