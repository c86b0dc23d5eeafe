"""The one way in which a recipe runs: measure sweeps, print each as a table, keep it in
data/measured/.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from course_lib import experiments, runtime
from course_lib.experiments import Sweep
from course_lib.runtime import Machine

Recipe = Callable[[Machine], Sweep]


def record(recipes: Sequence[Recipe], prefix: str = "") -> None:
    """Measure the recipes that the command line names, all if it names none.

    The first paragraph of a docstring is what it is about.
    """
    known = {recipe.__name__: recipe for recipe in recipes}
    chosen = sys.argv[1:] or list(known)
    if unknown := [name for name in chosen if name not in known]:
        sys.exit(f"{unknown[0]!r} is not known, expected some of: {', '.join(known)}")
    machine, script = runtime.detect(), Path(sys.argv[0]).name
    for name in chosen:
        about = about_of(known[name])
        sweep = replace(
            known[name](machine), about=about, recipe=f"python data/recipes/{script} {name}"
        )
        experiments.write(sweep, prefix + name)
        print(f"\n{about}\n\n{experiments.markdown(experiments.summary(sweep))}", flush=True)


def about_of(recipe: Recipe) -> str:
    """The first paragraph of its docstring, as one line."""
    return " ".join(inspect.getdoc(recipe).partition("\n\n")[0].split())
