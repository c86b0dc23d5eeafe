"""Tests of course_lib.checks: whatever a learner's function does, it gets one clear answer."""

import copy
import importlib
import json
import math
import re
import signal
import sys
import threading
from contextlib import suppress

import pytest
import torch

from course_lib import checks
from course_lib.checks import diagnosis, exercises, find
from course_lib.runtime import CourseError

KNOWN = [
    (name, sentence) for name, exercise in exercises().items() for sentence in exercise.mistakes
]


@pytest.fixture(autouse=True)
def short_limit(monkeypatch):
    monkeypatch.setattr(checks, "SECONDS", 1.0)


def filled_in(template):
    """A pattern for the sentence with whatever stands in its fields."""
    parts = re.split(r"\{\w+[^{}]*\}", template.replace("{{", "\0").replace("}}", "\1"))
    return (
        ".*".join(map(re.escape, parts)).replace("\0", re.escape("{")).replace("\1", re.escape("}"))
    )


@pytest.mark.parametrize(("name", "sentence"), KNOWN)
def test_a_mistake_is_named_by_its_own_sentence(name, sentence):
    found = diagnosis(name, find(name).mistakes[sentence]).splitlines()[0]
    assert re.fullmatch(f"not right yet: {filled_in(sentence)}", found), found


@pytest.mark.parametrize("name", exercises())
def test_an_exercise_knows_its_answer_and_at_least_five_mistakes(name):
    exercise = find(name)
    assert diagnosis(name, exercise.reference) is None
    assert len(exercise.mistakes) >= 5
    constant = exercise.result(exercise.reference, copy.deepcopy(exercise.cases[0]))
    assert diagnosis(name, lambda *arguments: constant) is not None
    assert diagnosis(name, lambda *arguments: 0) == diagnosis(name, lambda *arguments: 0)


def endless(*unused):
    while True:
        pass


def endless_and_stubborn(*unused):
    while True:
        with suppress(BaseException):
            math.sqrt(2)


def prints_endlessly(*unused):
    while True:
        print("a line", file=sys.stderr)


def recursion(*arguments):
    return recursion(*arguments)


def nested(depth):
    found = []
    for _ in range(depth):
        found = [found]
    return found


def contains_itself(*unused):
    found = []
    found.append(found)
    return found


def clears(*arguments):
    for argument in arguments:
        if isinstance(argument, list):
            argument.clear()
        elif isinstance(argument, torch.Tensor):
            argument.zero_()


class Hostile(Exception):
    def __str__(self):
        raise ValueError("no text")

    __repr__ = __len__ = __eq__ = __str__
    __hash__ = None


def raises_hostile(*unused):
    raise Hostile


RETURNED = {
    "None": None,
    "NaN": math.nan,
    "infinity": -math.inf,
    "a tensor of NaN": torch.full((3, 4), math.nan),
    "a wrong shape": torch.ones(2, 3, 4, requires_grad=True),
    "a tensor without data": torch.ones(3, device="meta"),
    "two empty lists": ([], []),
    "lists of lists of None": [[None, "a"], [[]]],
    "text": "answer",
    "a huge list": [0] * 10**6,
    "a huge tensor": torch.zeros(10**6),
    "a huge number": 10**400,
    "a complex number": 1j,
    "a dict of oddities": {None: {}, 1: Hostile()},
    "a class": dict,
    "hostile objects": [Hostile(), Hostile()],
    "a deep nest": nested(5000),
    "a generator": (number for number in [1]),
}
NASTY = {f"returns {what}": lambda *a, value=value: value for what, value in RETURNED.items()} | {
    "returns itself": contains_itself,
    "never returns": endless,
    "never returns and catches": endless_and_stubborn,
    "prints without end": prints_endlessly,
    "raises": lambda *a: 1 / 0,
    "raises a hostile exception": raises_hostile,
    "raises NotImplementedError with a reason": lambda *a: (
        torch.ones(1, dtype=torch.bool).log_softmax(0) and a.foo
    ),
    "exits": lambda *a: sys.exit(3),
    "recurses": recursion,
    "clears its arguments": clears,
    "takes nothing": lambda: 1,
    "takes too much": lambda a, b, c, d, e, f: 1,
    "takes keywords only": lambda *, a: 1,
    "is a built-in": max,
    "is a class": type,
    "is no function": 3,
}


@pytest.mark.parametrize("nasty", NASTY)
def test_nothing_that_a_learner_writes_stops_the_notebook(nasty, capsys):
    slow = "end" in nasty or "never" in nasty
    for name in list(exercises())[: 1 if slow else None]:
        assert checks.check(name, NASTY[nasty]) is None
        printed = capsys.readouterr()
        assert printed.err == ""
        assert printed.out.startswith(f"{name} ")
        assert "passed" not in printed.out
        assert "Traceback" not in printed.out
        assert len(printed.out.splitlines()) <= 10
        assert max(map(len, printed.out.splitlines())) < 500


def my_keep(scores):
    worst = scores["largest"]
    return worst < 0.7


def appends(prompt_ids, answer_ids, eos_id):
    answer_ids.append(eos_id)
    return find("E1.1").reference(prompt_ids, answer_ids[:-1], eos_id)


def fills(logits, labels):
    loss = find("E1.3").reference(logits, labels)
    labels[labels == -100] = 0
    return loss


@pytest.mark.parametrize(
    ("name", "function", "said"),
    [
        ("E1.7", my_keep, "raises TypeError: list indices must be integers"),
        ("E1.7", my_keep, '`worst = scores["largest"]`\n  my_keep([0.2, 0.5])'),
        ("E1.1", appends, "changes its argument `answer_ids`"),
        ("E1.3", fills, "changes its argument `labels`"),
        ("E1.8", lambda lengths: [], "must take these arguments: lengths, capacity"),
        (
            "E1.8",
            lambda lengths, capacity: None,
            "None, expected a list: does your function end with `return`?",
        ),
        ("E1.7", True, 'found True or False, expected your function: check("E1.7", my_function)'),
        ("E1.5", endless, "stopped after 1 seconds"),
        ("E2.9", lambda weight, adapters, shares: weight, "[(<tensor 2 x 4>, <tensor 3 x 2>, 6),"),
        ("E2.7", lambda x, upstream, a, b, alpha: 1.5, "is a number, expected a list"),
        (
            "E1.1",
            lambda prompt, answer, eos: (
                [*prompt, *answer, eos],
                [0, -100, -100, -100, *answer, eos],
            ),
            "  found        0 -100 -100 -100 21 22 0\n  expected  -100 -100 -100 -100 21 22 0\n   "
            "            ^",
        ),
    ],
)
def test_what_is_wrong_is_said_and_shown(name, function, said):
    assert said in diagnosis(name, function)


def test_an_untouched_stub_is_not_done_yet_and_the_notebook_goes_on(capsys):
    def stub(scores):
        raise NotImplementedError

    assert checks.use("E1.7", stub) is find("E1.7").reference
    assert capsys.readouterr().out == "E1.7 not done yet\n  the cells below use the reference\n"


def test_a_right_function_is_used_from_then_on(capsys):
    def mine(scores):
        print("scores:", scores)  # is dropped
        return max(scores, default=0) < 0.7

    assert checks.use("E1.7", mine) is mine
    assert capsys.readouterr().out == "E1.7 passed: the cells below use your function\n"


def test_an_unknown_exercise_lists_the_known_ones():
    for name in ("E9.9", ["E1.5"]):
        with pytest.raises(
            CourseError, match=r"is not known, expected one of E1\.1, E1\.2"
        ) as raised:
            checks.check(name, len)
        assert "\n" not in str(raised.value)


def test_the_signal_handler_is_put_back_and_threads_are_answered():
    before = signal.getsignal(signal.SIGALRM)
    diagnosis("E1.5", endless)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(diagnosis("E1.5", find("E1.5").reference))
    )
    thread.start()
    thread.join()
    assert answers == [None]


def test_the_users_interrupt_goes_through():
    def interrupted(scores):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diagnosis("E1.7", interrupted)


def test_tuples_tensors_arrays_and_masks_are_read_as_lists():
    assert checks.plain((torch.ones(2, dtype=torch.int64), {"a": torch.zeros(1).numpy()})) == [
        [1, 1],
        {"a": [0.0]},
    ]
    batch = find("E1.2").reference
    assert diagnosis("E1.2", lambda *a: tuple(part.tolist() for part in batch(*a))) is None
    assert diagnosis("E1.2", lambda *a: (batch(*a)[0], batch(*a)[1].bool(), batch(*a)[2])) is None


def test_the_global_state_of_torch_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for name, exercise in exercises().items():
        diagnosis(name, exercise.reference)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_translation_is_a_file(monkeypatch, tmp_path):
    templates = checks.sentences()
    assert len(templates) == len(set(templates)) > 200
    (tmp_path / "xx.json").write_text(
        json.dumps({template: template.upper() for template in ["passed", "not done yet"]})
    )
    monkeypatch.setattr(checks, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setenv("COURSE_LANGUAGE", "xx")
    checks._translations.cache_clear()
    assert checks.say("passed") == "PASSED"
    assert checks.say("not right yet: {problem}", problem="x") == "not right yet: x"


def test_our_rouge_l_is_that_of_the_package():
    from rouge_score.rouge_scorer import RougeScorer

    scorer, exercise = RougeScorer(["rougeL"]), find("E1.6")
    for first, second in exercise.cases:
        expected = scorer.score(" ".join(first), " ".join(second))["rougeL"].fmeasure
        assert exercise.reference(first, second) == pytest.approx(expected, abs=1e-12)


def test_days_are_found_and_none_is_named():
    for name, exercise in exercises().items():
        assert (
            importlib.import_module(f"course_lib.checks.day{name[1]}").EXERCISES[name] is exercise
        )


def test_of_dictionaries_only_what_differs_is_shown(capsys, monkeypatch):
    about = {"a long part that is right": "x" * 90}
    exercise = checks.Exercise(lambda n: about | {"sum": n}, [(3,)], {})
    monkeypatch.setattr(checks, "exercises", lambda: {"E9.9": exercise})
    checks.check("E9.9", lambda n: about | {"sum": n + 1})
    shown = capsys.readouterr().out
    assert "found     {'sum': 4}" in shown
    assert "expected  {'sum': 3}" in shown
