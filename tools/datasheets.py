"""The measured tables in the datasheets of data/, from the sweeps in data/measured/.

A table stands below a comment that names its sweep: <!-- measured: week, time, peak memory -->,
with what it shows beside the sweep's own measures.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from course_lib import experiments
from course_lib.runtime import data_folder

TABLE = re.compile(r"^(<!-- measured: (\w+)((?:, [\w ]+)*) -->\n\n)(?:\|.*\n)*", re.M)


def pages() -> list[Path]:
    """The datasheets."""
    return sorted(data_folder().rglob("README.md"))


def with_tables(page: str) -> str:
    """The page with its tables brought up to date."""

    def table(match: re.Match) -> str:
        sweep = experiments.read(match[2])
        more = filter(None, match[3].split(", "))
        return (
            match[1]
            + experiments.markdown(experiments.summary(sweep, *sweep.measures, *more))
            + "\n"
        )

    return TABLE.sub(table, page)


def refresh() -> Iterator[Path]:
    """Bring every datasheet up to date. Yields those that changed."""
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if (fresh := with_tables(text)) != text:
            path.write_text(fresh, encoding="utf-8")
            yield path
