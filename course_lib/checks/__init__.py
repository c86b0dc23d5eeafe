"""Exercises that answer back: `check("E1.1", my_function)` prints "E1.1 passed", or what is wrong, named by its symptom.

The exercises of a day stand in `course_lib/checks/dayN.py`, in a dict EXERCISES. To declare one takes three functions:

    cases(rng)                                  yields tuples of arguments, small ones first; random, with hostile ones among them
    reference(*arguments)                       the right result
    symptom(found, expected, *arguments)        what a known mistake looks like in the result, as one sentence, or None

A symptom sees a result of the right kind, in plain lists and numbers. Where it knows nothing, the first difference is named.
Results may come as lists, tuples, arrays or tensors; floats are compared to 1e-5, whole numbers exactly.

Nothing that a learner's function does stops the notebook: exceptions, endless loops, changed arguments and odd results are named.
What the function prints is dropped; a learner who wants to see it calls the function.
"""

import copy
import importlib
import inspect
import math
import os
import random
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from numbers import Real
from typing import Any

from course_lib.runtime import CourseError, first_line

DAYS = ("day1", "day2")
SECONDS = 5.0  # for one check; a right function takes milliseconds
MAX_VALUES = 10_000  # in a result; the largest right one has a few hundred
WIDTH = 100  # characters of a printed value


@dataclass(frozen=True)
class Exercise:
    """What a learner's function is compared with; see above."""

    reference: Callable[..., Any]
    cases: Callable[[random.Random], Iterator[tuple]]
    symptom: Callable[..., str | None]


@dataclass(frozen=True)
class Verdict:
    """message: what `check` prints; its first line is the diagnosis."""

    passed: bool
    message: str


class _TooSlowError(BaseException):
    """Not an Exception, so that `except Exception` in a learner's loop does not swallow it."""


class _TooLargeError(Exception):
    pass


def check(name: str, function: Callable[..., Any]) -> None:
    """Print whether `function` solves exercise `name`. Raises CourseError for an unknown name, and nothing else.

    >>> check("E1.8", lambda losses: 1.0)  # doctest: +ELLIPSIS
    E1.8 not right yet: ...
    """
    print(run(name, function).message)


def run(name: str, function: Callable[..., Any]) -> Verdict:
    """Compare `function` with the reference on all cases of exercise `name`; the first difference decides."""
    exercise = find(name)
    if not callable(function):
        return Verdict(False, f'{name}: found {kind(function)}, expected your function: check("{name}", my_function)')
    try:
        with _deadline(SECONDS):
            for arguments in exercise.cases(random.Random(name)):
                message = _try(exercise, function, arguments)
                if message:
                    return Verdict(False, f"{name} {message}")
    except _TooSlowError:
        return Verdict(False, f"{name} not right yet: your function was stopped after {SECONDS:g} seconds: does a loop never end?")
    return Verdict(True, f"{name} passed")


def find(name: str) -> Exercise:
    """The exercise of this name. Raises CourseError, which lists the known ones."""
    known: dict[str, Exercise] = {}
    for day in DAYS:
        known |= importlib.import_module(f"course_lib.checks.{day}").EXERCISES
    if not isinstance(name, str) or name not in known:
        raise CourseError(f"exercise {str(name)[:40]!r} is not known, expected one of {', '.join(known)}")
    return known[name]


def _try(exercise: Exercise, function: Callable[..., Any], arguments: tuple) -> str | None:
    """What is wrong with `function` on one case, or None."""
    names = list(inspect.signature(exercise.reference).parameters)
    if not _accepts(function, arguments):
        return f"not right yet: your function must take these arguments: {', '.join(names)}"
    given = copy.deepcopy(arguments)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            result = function(*given)
    except NotImplementedError as error:
        return _raised(error, function, arguments) if error.args else "not done yet"
    except (KeyboardInterrupt, _TooSlowError):
        raise
    except BaseException as error:  # SystemExit too
        return _raised(error, function, arguments)
    for name, before, after in zip(names, arguments, given, strict=True):
        if not _same(after, before):
            return f"not right yet: your function changes its argument `{name}`: build a new object, or copy it first"
    expected = plain(exercise.reference(*copy.deepcopy(arguments)))
    try:
        found = plain(result)
        problem = difference(found, expected)
    except _TooLargeError:
        return f"not right yet: your function returns more than {MAX_VALUES:,} values"
    except Exception:
        return f"not right yet: your function returns {kind(result)} that cannot be compared"
    if problem is None:
        return None
    if kind(found) == kind(expected):
        with suppress(Exception):  # a result with a shape that the symptom does not foresee
            problem = exercise.symptom(found, expected, *arguments) or problem
    lines = [f"not right yet: {problem}", f"  {_call(function, arguments)}"]
    with suppress(Exception):  # objects that cannot be printed
        lines += _side_by_side(found, expected)
    return "\n".join(lines)


def _accepts(function: Callable[..., Any], arguments: tuple) -> bool:
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # some built-in functions have no signature
        return True
    return True


def _raised(error: BaseException, function: Callable[..., Any], arguments: tuple) -> str:
    """An exception in the learner's code: type, message, line; then the call."""
    try:
        text = first_line(error)
    except Exception:  # its __str__ fails as well
        text = ""
    kind_of_error = type(error).__name__
    problem = kind_of_error if text in ("", kind_of_error) else f"{kind_of_error}: {text}"
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == file:
            problem += f", in line {frame.lineno}" + (f": `{frame.line}`" if frame.line else "")
            break
    return f"not right yet: your function raises {problem}\n  {_call(function, arguments)}"


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise _TooSlowError in the block after `seconds`; only where the system has timer signals, and in the main thread."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*unused: Any) -> None:
        raise _TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)  # then ten times a second, for a bare `except:` in a loop
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def plain(value: Any) -> Any:
    """Tensors, arrays and tuples as lists, their numbers as Python's; everything else as it is.

    >>> plain(({"a": (1, 2)}, 3))
    [{'a': [1, 2]}, 3]
    """
    left = MAX_VALUES

    def convert(value: Any) -> Any:
        nonlocal left
        left -= 1
        size = getattr(value, "size", 0) if hasattr(value, "tolist") else 0  # a number for arrays, a method for tensors
        if left < 0 or (value.numel() if hasattr(value, "numel") else size) > left:
            raise _TooLargeError
        if hasattr(value, "tolist"):
            return value.tolist()
        if isinstance(value, list | tuple):
            return [convert(item) for item in value]
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        return value

    return convert(value)


def kind(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "None"
    for types, words in (
        (bool, "True or False"),
        (Real, "a number"),
        (str, "text"),
        (list | tuple, "a list"),
        (dict, "a dict"),
    ):
        if isinstance(value, types):
            return words
    return f"an object of type {type(value).__name__}"


def difference(found: Any, expected: Any, place: str = "the result") -> str | None:
    """The first place where plain values differ, as a sentence; None if they agree.

    >>> difference([1, [2, 2]], [1, [2, 3]])
    'the result[1][1] is 2, expected 3'
    """
    if isinstance(found, bool) and isinstance(expected, Real) and not isinstance(expected, bool):
        found = int(found)  # a mask of True and False
    if kind(found) != kind(expected):
        hint = ": does your function end with `return`?" if found is None and place == "the result" else ""
        return f"{place} is {kind(found)}, expected {kind(expected)}{hint}"
    if isinstance(expected, list):
        if len(found) != len(expected):
            return f"{place} has {len(found)} entries, expected {len(expected)}"
        pairs = enumerate(zip(found, expected, strict=True))
        return next(filter(None, (difference(a, b, f"{place}[{i}]") for i, (a, b) in pairs)), None)
    if isinstance(expected, dict):
        for key in found:
            if key not in expected:
                return f"{place} has the key {key!r}, which does not belong there"
        for key in expected:
            if key not in found:
                return f"{place} has no key {key!r}"
        return next(filter(None, (difference(found[key], expected[key], f"{place}[{key!r}]") for key in expected)), None)
    if _equal(found, expected):
        return None
    return f"{place} is {_show(found)}, expected {_show(expected)}"


def _equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=1e-5, abs_tol=1e-6)
    return bool(found == expected)


def close(found: Any, wrong: Any) -> bool:
    """Is this the result of a known mistake? For symptoms.

    >>> close([0.5, 1], [0.5, 1.0]), close([0.5], 0.5)
    (True, False)
    """
    return difference(plain(found), plain(wrong)) is None


def _same(after: Any, before: Any) -> bool:
    try:
        return difference(plain(after), plain(before)) is None
    except Exception:  # an argument that the learner's code made unreadable
        return False


def _row_lengths(rows: list) -> list[int | None]:
    return [len(row) if isinstance(row, list) else None for row in rows]


def _show(value: Any) -> str:
    """A value on one line, cut at WIDTH; numbers with at most six digits after the point, tensors by their shape."""
    try:
        text = re.sub(r"(\.\d{6})\d+(?!\d*e)", r"\1", _text(value))
    except Exception:  # a learner's object
        text = kind(value)
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."


def _text(value: Any) -> str:
    if hasattr(value, "shape"):
        return f"<{type(value).__name__.lower()} {' x '.join(map(str, value.shape))}>"
    if type(value) is list:
        return f"[{', '.join(map(_text, value))}]"
    if type(value) is tuple and len(value) > 1:
        return f"({', '.join(map(_text, value))})"
    return repr(value)


def _call(function: Callable[..., Any], arguments: tuple) -> str:
    return f"{getattr(function, '__name__', 'your function')}({', '.join(map(_show, arguments))})"


def _side_by_side(found: Any, expected: Any) -> list[str]:
    """Both results as text; lists in columns, with a mark under what differs. Of a list of lists: the first row that differs."""
    both = isinstance(found, list) and isinstance(expected, list)
    nested = both and any(isinstance(value, list) for value in found + expected)
    if nested and max(len(repr(found)), len(repr(expected))) > WIDTH / 2 and _row_lengths(found) == _row_lengths(expected):
        return _side_by_side(*next(pair for pair in zip(found, expected, strict=True) if difference(*pair)))
    if not both or nested or max(len(found), len(expected)) > 20:
        return [f"  found     {_show(found)}", f"  expected  {_show(expected)}"]
    columns, marks = [], []
    for i in range(max(len(found), len(expected))):
        pair = [_show(row[i]) if i < len(row) else "" for row in (found, expected)]
        width = max(map(len, pair))
        columns.append([text.rjust(width) for text in pair])
        marks.append(("^" if pair[0] != pair[1] else "").rjust(width))
    rows = list(zip(*columns, strict=True)) or [(), ()]
    lines = [f"  found     {' '.join(rows[0])}", f"  expected  {' '.join(rows[1])}", f"            {' '.join(marks)}"]
    return [line.rstrip() for line in lines if line.strip()]
