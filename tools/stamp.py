"""The repository's address, which pyproject.toml has, in the badges and the cells for Colab."""

import re
import tomllib
from pathlib import Path

from course_lib.runtime import CourseError, first_line


def stamp(root: Path) -> list[Path]:
    """Write the address into README and notebooks. Returns the files that changed."""
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        address = str(project["urls"]["Repository"])
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise CourseError(
            f"no address under [project.urls] in pyproject.toml ({first_line(error)}): "
            "run this in a checkout"
        ) from None
    match = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", address)
    if match is None:
        raise CourseError(
            f"the address {address!r} in pyproject.toml is not https://github.com/owner/name: "
            "correct it"
        )
    places = {
        r"(colab\.research\.google\.com/github/)[\w.-]+/[\w.-]+(/blob)": rf"\g<1>{match[1]}\g<2>",
        r'(REPO, REF = \\")[\w.-]+/[\w.-]+(\\")': rf"\g<1>{match[1]}\g<2>",
    }
    changed = []
    for path in [root / "README.md", *sorted(root.glob("notebooks/*.ipynb"))]:
        text = stamped = path.read_text(encoding="utf-8")
        for pattern, replacement in places.items():
            stamped = re.sub(pattern, replacement, stamped)
        if stamped != text:
            path.write_text(stamped, encoding="utf-8")
            changed.append(path)
    return changed
