"""Folders that are whole or absent.

A folder is written under a temporary name, sealed with the SHA-256 of each of its files, flushed to
disk and only then renamed to its final name. A process that is killed half-way leaves a temporary
folder that nobody reads; a file that is damaged later no longer matches its seal, and neither does
the seal itself. A folder that is replaced is renamed before and deleted after; one that a killed
process left renamed is put back by `recover`.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

SEAL = "SEAL.json"
PARTIAL, REPLACED = ".partial-", ".replaced-"


class DamagedError(Exception):
    """A folder that is not what was sealed.

    The message names the file and what is wrong with it.
    """


def partial_folder(final: Path) -> Path:
    """A new empty folder beside `final`, to be filled and then published.

    What a killed process left there is removed.
    """
    partial = final.parent / f"{PARTIAL}{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def publish(partial: Path, final: Path, facts: dict) -> None:
    """Seal `partial` and rename it to `final`, replacing what is there.

    facts: JSON values to keep in the seal
    """
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    seal(partial, files, facts)
    for path in [*files, partial / SEAL, partial]:
        _flush(path)
    recover(final)
    replaced = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():
        os.replace(final, replaced)
    os.replace(partial, final)
    _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def recover(final: Path) -> None:
    """Put back what a killed process renamed to replace it, unless the new one is there."""
    replaced = final.with_name(f"{REPLACED}{final.name}")
    with contextlib.suppress(OSError):
        if replaced.exists() and not final.exists():
            os.replace(replaced, final)
    shutil.rmtree(replaced, ignore_errors=True)


def seal(folder: Path, files: Iterable[Path], facts: dict) -> None:
    """Write the seal of `files`, which lie in `folder`, into it."""
    sealed = {
        "facts": facts,
        "sha256": {path.relative_to(folder).as_posix(): sha256(path) for path in files},
    }
    sealed = {**sealed, "seal": _fingerprint(sealed)}
    (folder / SEAL).write_text(json.dumps(sealed, indent=1) + "\n", encoding="utf-8")


def check(folder: Path, others: Collection[str] = ()) -> dict:
    """The facts in the seal of `folder`.

    Raises DamagedError if a file is missing or changed, or foreign to the seal.

    others: names of files that may lie there beside the sealed ones; hidden files always may
    """
    facts, checksums = _read(folder)
    present = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    } - {SEAL, *others}
    for name in sorted(name for name in present ^ checksums.keys() if not name.startswith(".")):
        raise DamagedError(
            f"{folder.name}/{name} is {'missing' if name in checksums else 'not in the seal'}"
        )
    for name, expected in checksums.items():
        if sha256(folder / name) != expected:
            raise DamagedError(f"{folder.name}/{name} differs from its checksum")
    return facts


def facts(folder: Path) -> dict:
    """The facts in the seal of `folder`, believed without a look at its other files.

    Raises DamagedError if there is no readable seal.
    """
    return _read(folder)[0]


def _read(folder: Path) -> tuple[dict, dict]:
    """The facts and the checksums of a seal."""
    try:
        sealed = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        facts, checksums = dict(sealed["facts"]), dict(sealed["sha256"])
        if sealed["seal"] != _fingerprint({"facts": facts, "sha256": checksums}):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise DamagedError(f"{folder.name} has no readable {SEAL}") from None
    return facts, checksums


def _fingerprint(sealed: dict) -> str:
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until the disk has it.

    Windows and network drives cannot flush a folder; there a rename is as safe as they make it.
    """
    if path.is_dir():
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return
    with path.open("r+b") as file:  # Windows flushes only what was opened for writing
        os.fsync(file.fileno())
