"""The command line: python -m course_lib COMMAND."""

import sys
from pathlib import Path
from typing import Annotated

from course_lib.runtime import CourseError

try:
    import typer

    from course_lib import preflight
except ImportError as missing:  # typer or packaging: the commands that would say so cannot be built
    sys.exit(
        f"CourseError: {missing.name} is missing: run `make setup` and use .venv, or pip install "
        "-e '.[course]'"
    )

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Seven Days of LLM Fine-Tuning.",
    pretty_exceptions_enable=False,
)


@app.command()
def fetch() -> None:
    """Put the base model of the CPU into the cache, if it is not there.

    Without it the course runs on a smaller one.
    """
    from course_lib import models

    try:
        folder = models.unpacked_smollm2(verify=False)
        print(f"base model: smollm2-135m in {folder}")
    except CourseError as error:
        print(f"base model: tiny, since {error}")


@app.command()
def doctor() -> None:
    """Look at packages, device, memory, disk, base model and Hub: a line each, with the next step
    where one is needed.
    """
    problems = 0
    for finding in preflight.findings():
        print(finding, flush=True)
        problems += finding.state == "problem"
    if problems:
        raise typer.Exit(1)


@app.command()
def plan(
    model: Annotated[
        str, typer.Option(help="a known model, a folder with config.json, owner/name")
    ],
    gpu: Annotated[str, typer.Option(help="a known GPU, its memory in GB, or cpu")],
    method: Annotated[str, typer.Option(help="full, lora, qlora, adalora, prefix, ...")] = "qlora",
    batch: Annotated[int, typer.Option(help="rows at a time, without accumulation")] = 1,
    length: Annotated[int | None, typer.Option(help="of the longest row; 512 without data")] = None,
    checkpointing: Annotated[bool, typer.Option(help="compute activations twice")] = False,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw-8bit, paged-adamw, sgd")] = "adamw",
    size: Annotated[int | None, typer.Option(help="a rank, tokens or a width")] = None,
    dtype: Annotated[str | None, typer.Option(help="of the base; float16, on CPUs float32")] = None,
    accumulate: Annotated[int, typer.Option(help="batches before a step")] = 1,
    shards: Annotated[int, typer.Option(help="GPUs that share the weights")] = 1,
    data: Annotated[
        Path | None, typer.Option(help="a file of records: takes length from it")
    ] = None,
) -> None:
    """Does a fine-tuning fit? From shapes alone: nothing is downloaded for known models."""
    from course_lib import planner

    cpu = gpu.strip().lower() == "cpu"
    supervised = 1.0
    if data is not None:
        if length is not None:
            raise CourseError("found a length and data, which has one: give one of the two")
        lengths = planner.lengths_of(data)
        length, supervised = lengths.longest, lengths.supervised
    recipe = planner.Recipe(
        model,
        method,
        batch,
        512 if length is None else length,
        checkpointing,
        optimizer,
        size,
        dtype=dtype or ("float32" if cpu else "float16"),
        supervised=supervised,
        shards=shards,
        accumulate=accumulate,
        framework=planner.FRAMEWORK_CPU if cpu else planner.FRAMEWORK_GPU,
    )
    report = planner.report(recipe, gpu)
    if data is not None:
        print(lengths)
    print(report)


def main() -> None:
    """Run a command; a mistake is one line on stderr and exit code 1, never a traceback."""
    try:
        sys.exit(app(standalone_mode=False))
    except CourseError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except Exception as error:
        if not hasattr(error, "format_message"):  # all of typer's have it
            raise
        found = error.format_message()  # nothing, where the help was printed
        sys.exit(f"CourseError: {found} Try --help." if found else 0)


if __name__ == "__main__":
    main()
