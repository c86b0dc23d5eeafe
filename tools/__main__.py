"""The command line of the repository: python -m tools COMMAND.

That of the course is python -m course_lib.
"""

import sys
from pathlib import Path
from typing import Annotated

import nbformat
import typer

from course_lib import runtime
from course_lib.runtime import CourseError
from tools import notebooks
from tools.stamp import stamp as write_address

HELP = "Run, draw and stamp the course."
app = typer.Typer(
    add_completion=False, no_args_is_help=True, help=HELP, pretty_exceptions_enable=False
)


@app.command()
def run(
    day: Annotated[int | None, typer.Option(help="Only this day.", min=1)] = None,
    keep: Annotated[bool, typer.Option(help="Write the new outputs back into notebooks/.")] = False,
) -> None:
    """Execute the notebooks on this machine and write build/course/index.html."""
    print(runtime.detect())
    target = Path("build/course")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CourseError(
            f"{target} cannot be written ({error.strerror}): make room for the results there first"
        ) from None
    executions = []
    for path in notebooks.find_notebooks(Path("notebooks"), day):
        execution = notebooks.execute(path)
        print(execution)
        executions.append(execution)
        if keep and not execution.failure:
            nbformat.write(execution.notebook, path)
    from tools.page import write_page  # after the kernels: torch would take memory beside them

    index = write_page(executions, target, Path("build/slides"))
    print(f"the course as a page: {index}")
    failed = [execution for execution in executions if execution.failure]
    if failed:
        raise CourseError(
            f"{len(failed)} of {len(executions)} notebooks failed: {'; '.join(map(str, failed))}"
        )


@app.command(name="figures")
def draw() -> None:
    """Redraw the slides' figures and the measured tables of decks and datasheets."""
    from tools import datasheets, figures

    for path in [*figures.draw(), *datasheets.refresh()]:
        print(path)


@app.command()
def stamp() -> None:
    """Write the repository's address from pyproject.toml into badges and Colab cells."""
    changed = write_address(Path("."))
    print(
        f"stamped {', '.join(map(str, changed))}"
        if changed
        else "every badge and Colab cell already has the address"
    )


def main() -> None:
    """Run a command; a CourseError is one line on stderr and exit code 1, never a traceback."""
    try:
        app()
    except CourseError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
