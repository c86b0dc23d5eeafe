"""The memory bill of training: bytes of weights, gradients and optimizer states for each parameter.

Adam keeps two moments of each weight in float32. Activations depend on batch and length and come on top; one bill in use sets
eight bytes aside for them.
"""

from dataclasses import dataclass

from course_lib.runtime import CourseError


@dataclass(frozen=True)
class Bill:
    """Bytes for each trained parameter. other: the float32 master copy of mixed precision, or what is set aside for activations."""

    about: str
    source: str
    weights: int
    gradients: int
    moments: int
    other: int = 0

    @property
    def bytes_per_parameter(self) -> int:
        return self.weights + self.gradients + self.moments + self.other


BILLS = {
    "bf16": Bill(
        about="bf16 weights and gradients, float32 moments, no master copy",
        source="the 783 GB for 65B in QLoRA, arXiv 2305.14314, section 1",
        weights=2, gradients=2, moments=8,
    ),
    "fp32": Bill(
        about="everything in float32, as on our CPU",
        source="four float32 numbers for each weight",
        weights=4, gradients=4, moments=8,
    ),
    "mixed, ZeRO": Bill(
        about="fp16 weights and gradients, float32 master copy and moments",
        source="ZeRO, arXiv 1910.02054, section 3.1",
        weights=2, gradients=2, moments=8, other=4,
    ),
    "mixed, HF": Bill(
        about="the same with float32 gradients",
        source="the transformers documentation on the anatomy of training memory",
        weights=2, gradients=4, moments=8, other=4,
    ),
    "fp32 + 8": Bill(
        about="float32, with eight bytes set aside for activations",
        source="the estimate of 4 + 20 bytes that many notes copy",
        weights=4, gradients=4, moments=8, other=8,
    ),
}  # fmt: skip


def training_bytes(parameters: int, bill: str) -> int:
    """Bytes to train `parameters` weights with Adam; `bill` is a key of BILLS.

    >>> training_bytes(1_000_000_000, "fp32 + 8")
    24000000000
    """
    if bill not in BILLS:
        raise CourseError(f"bill {bill!r} is not known, expected one of {', '.join(BILLS)}")
    return parameters * BILLS[bill].bytes_per_parameter
