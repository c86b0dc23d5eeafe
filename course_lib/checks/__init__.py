"""Exercises that answer back.

    my_labels = checks.use("E1.1", my_labels)  # yours if it passes, or else the reference
    checks.check("E1.9", my_perplexity)  # prints "E1.9 passed", or what is wrong

An exercise is data: a reference, cases, and known mistakes, each a wrong function and its sentence.
Where the learner's result equals that of a wrong function, its sentence is printed; the tests walk
the same list, so each diagnosis is proved by the function that makes it. The exercises of a day
stand in `dayN.py`, in a dict EXERCISES.

Sentences are plain, or templates with named fields: `found`, `expected`, the arguments, and what
the exercise's `facts` add. A translation is a file CODE.json beside this one, from each sentence of
`sentences()` to its translation; COURSE_LANGUAGE=CODE chooses it.

Nothing that a learner's function does stops the notebook: exceptions, endless loops, changed
arguments and odd results are named. Results may be lists, tuples, arrays or tensors; floats are
compared to 1e-5. What the function prints is dropped.
"""

import ast
import copy
import importlib
import inspect
import json
import math
import os
import pkgutil
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any

from course_lib.runtime import CourseError, first_line

SECONDS = 5.0  # for one check; a right function takes milliseconds
MAX_VALUES = 10_000  # in a result; the largest right one has a few hundred
WIDTH = 100  # characters of a printed value
KINDS = {
    "True or False": bool,
    "a number": Real,
    "text": str,
    "a list": list | tuple,
    "a dict": dict,
    "None": type(None),
}
Function = Callable[..., Any]


@dataclass(frozen=True)
class Exercise:
    """What a learner's function is compared with.

    cases: tuples of arguments; a small one first, hostile ones among them
    mistakes: what each is, in one sentence, and a wrong function that makes it; see `known`
    facts: the arguments -> more fields for the sentences
    otherwise: what to say of a wrong result that no known mistake gives; "" names the difference
    ask: (function, *arguments of a case) -> the result, for a function that changes what it is
        given; its docstring says what it does
    trains: the cells below train through the function, so that the type of its tensors and their
        gradient count
    """

    reference: Function
    cases: Sequence[tuple]
    mistakes: Mapping[str, Function]
    facts: Callable[..., dict[str, Any]] = lambda *arguments: {}
    otherwise: str = ""
    ask: Callable[..., Any] | None = None
    trains: bool = False

    def result(self, function: Function, arguments: tuple) -> Any:
        """What `function` gives for a case; what it prints is dropped."""
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            return self.ask(function, *arguments) if self.ask else function(*arguments)

    @property
    def parameters(self) -> list[str]:
        """What the learner's function takes."""
        return _required(self.reference)

    @property
    def fields(self) -> list[str]:
        """What the arguments of a case are called."""
        return _required(self.ask)[1:] if self.ask else self.parameters


def _required(function: Function) -> list[str]:
    """The names of the parameters without a default."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is parameter.empty]


class _TooSlowError(BaseException):
    """Not an Exception, so that `except Exception` in a learner's loop does not swallow it."""


def known(*alternating: Any) -> dict[str, Function]:
    """Mistakes: sentence, wrong function, sentence, wrong function, and so on."""
    return dict(zip(alternating[::2], alternating[1::2], strict=True))


def check(name: str, function: Function) -> None:
    """Print whether `function` solves exercise `name`. Raises CourseError for an unknown name.

    >>> check("E1.9", lambda losses: 1.0)  # doctest: +ELLIPSIS
    E1.9 not right yet: ...
    """
    print(name, diagnosis(name, function) or say("passed"))


def use(name: str, function: Function) -> Function:
    """`function` if it solves exercise `name`, otherwise the reference; says which, and why.

    >>> use("E1.9", lambda losses: 1.0)([[1.0, 3.0]])  # doctest: +ELLIPSIS
    E1.9 not right yet: ...
    7.38905609893065
    """
    problem = diagnosis(name, function)
    if problem is None:
        print(name, say("passed: the cells below use your function"))
        return function
    sentence, *example = problem.splitlines()
    print(name, "\n".join([sentence, *example, say("  the cells below use the reference")]))
    return find(name).reference


def built(*functions: Function) -> str:
    """How many of these pieces, as `use` gave them, the learner wrote; the others are references.

    >>> built(find("E1.1").reference, len)
    '1 of 2 pieces of your own'
    """
    references = [exercise.reference for exercise in exercises().values()]
    own = sum(function not in references for function in functions)
    return say("{own} of {all} pieces of your own", own=own, all=len(functions))


@cache
def exercises() -> dict[str, Exercise]:
    """All exercises by name, day by day."""
    found = sorted(module.name for module in pkgutil.iter_modules(__path__))
    days = [importlib.import_module(f"{__name__}.{day}") for day in found if day.startswith("day")]
    return {name: exercise for day in days for name, exercise in day.EXERCISES.items()}


def find(name: str) -> Exercise:
    """The exercise of this name. Raises CourseError, which lists the known ones."""
    if not isinstance(name, str) or name not in exercises():
        expected = f"expected one of {', '.join(exercises())}"
        raise CourseError(f"exercise {str(name)[:40]!r} is not known, {expected}")
    return exercises()[name]


def say(sentence: str, **fields: Any) -> str:
    """The sentence in the language of COURSE_LANGUAGE, with its fields filled in."""
    return (
        _translations(os.environ.get("COURSE_LANGUAGE", ""))
        .get(sentence, sentence)
        .format(**fields)
    )


@cache
def _translations(code: str) -> dict[str, str]:
    path = Path(__file__).with_name(f"{code}.json")
    return json.loads(path.read_text(encoding="utf-8")) if code.isalpha() and path.is_file() else {}


def sentences() -> list[str]:
    """Every sentence that a check can say, for translators."""
    calls = [
        node
        for node in ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    own = [call.args[0] for call in calls if getattr(call.func, "id", "") == "say"]
    found = [*KINDS, *(argument.value for argument in own if isinstance(argument, ast.Constant))]
    for exercise in exercises().values():
        asked = inspect.getdoc(exercise.ask) if exercise.ask else ""
        found += [
            *exercise.mistakes,
            exercise.otherwise,
            asked.partition("\n\n")[0].replace("\n", " "),
        ]
    return list(filter(None, dict.fromkeys(found)))


def diagnosis(name: str, function: Function) -> str | None:
    """What is wrong with `function` as an answer to exercise `name`, and a case that shows it; None
    if nothing is.
    """
    exercise = find(name)
    if not callable(function):
        expected = f'check("{name}", my_function)'
        return say(
            "found {found}, expected your function: {expected}",
            found=kind(function),
            expected=expected,
        )
    try:
        with _deadline(SECONDS):
            problem = _problem(exercise, function)
    except _TooSlowError:
        problem = say(
            "your function was stopped after {seconds:g} seconds: does a loop never end?",
            seconds=SECONDS,
        )
    return (
        problem
        if problem in (None, say("not done yet"))
        else say("not right yet: {problem}", problem=problem)
    )


def _problem(exercise: Exercise, function: Function) -> str | None:
    if not _accepts(function, exercise.parameters):
        names = ", ".join(exercise.parameters)
        return say("your function must take these arguments: {names}", names=names)
    names = exercise.fields
    for arguments in exercise.cases:
        given = copy.deepcopy(arguments)
        call = _call(exercise, getattr(function, "__name__", "your function"), arguments)
        try:
            result = exercise.result(function, given)
        except (KeyboardInterrupt, _TooSlowError):
            raise
        except BaseException as error:  # SystemExit too
            if isinstance(error, NotImplementedError) and not error.args:
                return say("not done yet")
            return (
                say("your function raises {error}", error=_described(error, function)) + f"\n{call}"
            )
        for name, before, after in zip(names, arguments, given, strict=True):
            if not _agree(after, before):
                return say(
                    "your function changes its argument `{name}`: build a new object, or copy it "
                    "first",
                    name=name,
                )
        expected = plain(exercise.result(exercise.reference, copy.deepcopy(arguments)))
        try:
            found = plain(result)
            problem = difference(found, expected)
        except OverflowError:
            return say("your function returns more than {most:,} values", most=MAX_VALUES)
        except Exception:
            return say("your function returns {found} that cannot be compared", found=kind(result))
        if problem is not None:
            fields = dict(zip(names, arguments, strict=True)) | {
                "found": found,
                "expected": expected,
            }
            sentence = (
                _sentence(exercise, function, found, arguments)
                if kind(found) == kind(expected)
                else ""
            )
            with suppress(Exception):  # a result that the sentence's fields do not foresee
                problem = (
                    say(sentence, **fields, **exercise.facts(*arguments)) if sentence else problem
                )
            return "\n".join([problem[:400], call, *_side_by_side(found, expected)])
    return _useless(exercise, function) if exercise.trains else None


def _useless(exercise: Exercise, function: Function) -> str | None:
    """Why the cells below could not train through a function whose numbers are right."""
    case = exercise.cases[0]
    for place, argument in enumerate(case):
        if not _is_floating(argument):
            continue
        given = [*copy.deepcopy(case)]
        given[place] = argument.clone().requires_grad_()
        results = (exercise.result(one, tuple(given)) for one in (exercise.reference, function))
        for right, found in zip(*map(_parts, results), strict=True):
            if getattr(found, "dtype", None) != right.dtype or not hasattr(found, "grad_fn"):
                return say(
                    "the numbers are right, but your function returns {found}, expected a tensor "
                    "of {expected}",
                    found=getattr(found, "dtype", kind(found)),
                    expected=right.dtype,
                )
            if right.grad_fn is not None and found.grad_fn is None:
                return say(
                    "the numbers are right, but no gradient comes back to `{name}`: leave detach, "
                    ".data and new parameters out",
                    name=exercise.fields[place],
                )
    return None


def _is_floating(argument: Any) -> bool:
    return hasattr(argument, "grad_fn") and argument.is_floating_point()


def _parts(result: Any) -> tuple:
    return tuple(result) if isinstance(result, list | tuple) else (result,)


def _sentence(exercise: Exercise, function: Function, found: Any, arguments: tuple) -> str:
    """Of the mistakes that give what was found the one that agrees on most other cases."""
    wrong = exercise.mistakes
    candidates = [one for one in wrong if _agree(_result(exercise, wrong[one], arguments), found)]
    if len(candidates) < 2:
        return candidates[0] if candidates else exercise.otherwise
    others = [(case, _result(exercise, function, case)) for case in exercise.cases]
    return max(
        candidates,
        key=lambda one: sum(
            _agree(_result(exercise, wrong[one], case), result) for case, result in others
        ),
    )


def _result(exercise: Exercise, function: Function, arguments: tuple) -> Any:
    """What `function` gives, or an object that agrees with nothing."""
    with suppress(Exception):
        return exercise.result(function, copy.deepcopy(arguments))
    return object()


def _call(exercise: Exercise, name: str, arguments: tuple) -> str:
    """A case as it is shown: as a call, or what is asked of the function."""
    shown = [*map(_show, arguments)]
    if exercise.fields == exercise.parameters:
        return f"  {name}({', '.join(shown)})"
    asked = say(inspect.getdoc(exercise.ask).partition("\n\n")[0].replace("\n", " "))
    settings = ", ".join(
        f"{field} {value}" for field, value in zip(exercise.fields, shown, strict=True)
    )
    return f"  {asked}\n  {settings}"


def _accepts(function: Function, names: Sequence[str]) -> bool:
    try:
        inspect.signature(function).bind(*names)
    except TypeError:
        return False
    except ValueError:  # some built-in functions have no signature
        return True
    return True


def _described(error: BaseException, function: Function) -> str:
    """An exception of the learner's code: type, message, line."""
    kind_of_error, text = type(error).__name__, ""
    with suppress(Exception):  # its __str__ may fail as well
        text = first_line(error)
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    place = (
        f", in line {own[-1].lineno}" + (f": `{own[-1].line}`" if own[-1].line else "")
        if own
        else ""
    )
    return (kind_of_error if text in ("", kind_of_error) else f"{kind_of_error}: {text}") + place


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise _TooSlowError in the block after `seconds`; only in the main thread, where the system
    has timer signals.
    """
    if (
        not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def stop(*unused: Any) -> None:
        raise _TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    # then ten times a second, for a bare `except:` in a loop
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def plain(value: Any) -> Any:
    """Tensors, arrays and tuples as lists, their numbers as Python's.

    Raises OverflowError for more than MAX_VALUES.

    >>> plain(({"a": (1, 2)}, 3))
    [{'a': [1, 2]}, 3]
    """
    left = MAX_VALUES

    def convert(value: Any) -> Any:
        nonlocal left
        left -= 1
        # a number for arrays, a method for tensors
        size = getattr(value, "size", 0) if hasattr(value, "tolist") else 0
        if left < 0 or (value.numel() if hasattr(value, "numel") else size) > left:
            raise OverflowError
        if hasattr(value, "tolist"):
            return value.tolist()
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        return [convert(item) for item in value] if isinstance(value, list | tuple) else value

    return convert(value)


def kind(value: Any) -> str:
    """What a value is, in words."""
    words = next((words for words, types in KINDS.items() if isinstance(value, types)), None)
    return say(words) if words else say("an object of type {name}", name=type(value).__name__)


def difference(found: Any, expected: Any, place: str = "the result") -> str | None:
    """The first place where plain values differ, as a sentence; None if they agree.

    >>> difference([1, [2, 2]], [1, [2, 3]])
    'the result[1][1] is 2, expected 3'
    """
    if isinstance(found, bool) and isinstance(expected, Real):
        found = type(expected)(found)  # a mask of True and False
    if kind(found) != kind(expected):
        forgotten = (
            say(": does your function end with `return`?")
            if found is None and place == "the result"
            else ""
        )
        return (
            say(
                "{place} is {found}, expected {expected}",
                place=place,
                found=kind(found),
                expected=kind(expected),
            )
            + forgotten
        )
    if isinstance(expected, list | dict) and len(found) != len(expected):
        return say(
            "{place} has {found} entries, expected {expected}",
            place=place,
            found=len(found),
            expected=len(expected),
        )
    if isinstance(expected, dict):
        if missing := [key for key in expected if key not in found]:
            return say("{place} has no key {key!r}", place=place, key=missing[0])
        return next(
            filter(
                None,
                (difference(found[key], expected[key], f"{place}[{key!r}]") for key in expected),
            ),
            None,
        )
    if isinstance(expected, list):
        pairs = enumerate(zip(found, expected, strict=True))
        return next(filter(None, (difference(a, b, f"{place}[{i}]") for i, (a, b) in pairs)), None)
    close = isinstance(expected, float) and math.isclose(
        found, expected, rel_tol=1e-5, abs_tol=1e-6
    )
    if close or found == expected or (found != found and expected != expected):
        return None
    return say(
        "{place} is {found}, expected {expected}",
        place=place,
        found=_show(found),
        expected=_show(expected),
    )


def _agree(one: Any, other: Any) -> bool:
    with suppress(Exception):  # what the learner's code made unreadable agrees with nothing
        return difference(plain(one), plain(other)) is None
    return False


def _show(value: Any) -> str:
    """A value on one line, cut at WIDTH; numbers with at most six digits after the point, tensors
    by their shape.
    """

    def text(value: Any) -> str:
        if hasattr(value, "shape"):
            return f"<{type(value).__name__.lower()} {' x '.join(map(str, value.shape))}>"
        if type(value) in (list, tuple) and len(value) > 1:
            inside = ", ".join(map(text, value))
            return f"[{inside}]" if type(value) is list else f"({inside})"
        return repr(value)

    shown = kind(value)
    with suppress(Exception):  # a learner's object
        shown = re.sub(r"(\.\d{6})\d+(?!\d*e)", r"\1", text(value))
    return shown if len(shown) <= WIDTH else shown[: WIDTH - 3] + "..."


def _side_by_side(found: Any, expected: Any) -> list[str]:
    """Both results as text; short lists in columns, with a mark under what differs.

    Of rows the first that differs, of dictionaries the entries that differ.
    """
    if isinstance(found, dict) and isinstance(expected, dict):
        same = {key for key in found.keys() & expected.keys() if _agree(found[key], expected[key])}
        found, expected = (
            {key: value for key, value in one.items() if key not in same}
            for one in (found, expected)
        )
    both = isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected)
    if (
        both
        and any(isinstance(value, list) for value in expected)
        and len(repr(expected)) > WIDTH / 2
    ):
        return _side_by_side(
            *next(pair for pair in zip(found, expected, strict=True) if not _agree(*pair))
        )
    if not both or any(isinstance(value, list) for value in found + expected) or len(found) > 20:
        return [f"  found     {_show(found)}", f"  expected  {_show(expected)}"]
    columns = [
        (_show(a), _show(b), "^" if _show(a) != _show(b) else "")
        for a, b in zip(found, expected, strict=True)
    ]
    padded = [[text.rjust(max(map(len, column))) for text in column] for column in columns]
    heads = ("  found    ", "  expected ", "           ")
    return [
        " ".join([head, *texts]).rstrip()
        for head, texts in zip(heads, zip(*padded, strict=True), strict=True)
    ]
