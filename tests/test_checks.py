"""Tests of course_lib.checks: a learner's function may do what it likes, and gets one clear answer."""

import importlib
import math
import sys
import threading
from contextlib import suppress

import pytest
import torch

from course_lib import checks
from course_lib.checks import day1, find, run
from course_lib.runtime import CourseError

NAMES = [name for day in checks.DAYS for name in importlib.import_module(f"course_lib.checks.{day}").EXERCISES]


@pytest.fixture(autouse=True)
def short_limit(monkeypatch):
    monkeypatch.setattr(checks, "SECONDS", 1.0)


def endless(*unused):
    while True:
        pass


def endless_and_stubborn(*unused):
    while True:
        with suppress(BaseException):
            math.sqrt(2)


def generator(*unused):
    while True:
        yield 1


def recursion(*arguments):
    return recursion(*arguments)


def contains_itself(*unused):
    found = []
    found.append(found)
    return found


def prints_endlessly(*unused):
    while True:
        print("a line", file=sys.stderr)
        print("a line")


def nested_deeply(*unused):
    found = []
    for _ in range(5000):
        found = [found]
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

    __repr__ = __str__
    __len__ = __str__
    __eq__ = __str__
    __hash__ = None


def raises_hostile(*unused):
    raise Hostile


NASTY = {
    "returns None": lambda *a: None,
    "returns NaN": lambda *a: math.nan,
    "returns infinity": lambda *a: -math.inf,
    "returns a tensor of NaN": lambda *a: torch.full((3, 4), math.nan),
    "returns a wrong shape": lambda *a: torch.ones(2, 3, 4, requires_grad=True),
    "returns a tensor without data": lambda *a: torch.ones(3, device="meta"),
    "returns an empty list": lambda *a: [],
    "returns two empty lists": lambda *a: ([], []),
    "returns lists of lists of None": lambda *a: [[None, "a"], [[]]],
    "returns text": lambda *a: "answer",
    "returns a huge list": lambda *a: [0] * 10**6,
    "returns a huge tensor": lambda *a: torch.zeros(10**6),
    "returns a huge number": lambda *a: 10**400,
    "returns a complex number": lambda *a: 1j,
    "returns a dict of oddities": lambda *a: {None: {}, 1: Hostile()},
    "returns a class": lambda *a: dict,
    "returns a hostile object": lambda *a: Hostile(),
    "returns a list of hostile objects": lambda *a: [Hostile(), Hostile()],
    "returns itself": contains_itself,
    "returns a deep nest": nested_deeply,
    "returns an endless generator": generator,
    "never returns": endless,
    "never returns and catches": endless_and_stubborn,
    "prints without end": prints_endlessly,
    "raises": lambda *a: 1 / 0,
    "raises a hostile exception": raises_hostile,
    "raises NotImplementedError with a reason": lambda *a: torch.ones(1, dtype=torch.bool).log_softmax(0) and a.foo,
    "exits": lambda *a: sys.exit(3),
    "recurses": recursion,
    "clears its arguments": clears,
    "takes nothing": lambda: 1,
    "takes too much": lambda a, b, c, d, e, f: 1,
    "takes keywords only": lambda *, a: 1,
    "is a built-in": max,
    "is a class": type,
    "is no function": 3,
    "is None": None,
}


@pytest.mark.parametrize("nasty", NASTY)
def test_nothing_that_a_learner_writes_stops_the_notebook(nasty, capsys):
    names = NAMES if "end" not in nasty and "never" not in nasty else NAMES[:1]
    for name in names:
        assert checks.check(name, NASTY[nasty]) is None
        printed = capsys.readouterr()
        assert printed.err == ""
        assert printed.out.startswith(name)
        assert "passed" not in printed.out
        assert "Traceback" not in printed.out
        assert len(printed.out.splitlines()) <= 10
        assert max(map(len, printed.out.splitlines())) < 500


def test_an_untouched_stub_is_not_done_yet(capsys):
    def stub(scores):
        raise NotImplementedError

    checks.check("E1.3", stub)
    assert capsys.readouterr().out == "E1.3 not done yet\n"


def test_an_unknown_exercise_lists_the_known_ones():
    with pytest.raises(CourseError, match=r"exercise 'E9\.9' is not known, expected one of E1\.1, E1\.2") as raised:
        checks.check("E9.9", len)
    assert "\n" not in str(raised.value)
    with pytest.raises(CourseError, match="is not known"):
        checks.check(["E1.1"], len)


def test_an_exception_is_shown_with_type_message_and_line():
    def my_keep(scores):
        worst = scores["largest"]
        return worst < 0.7

    message = run("E1.3", my_keep).message.splitlines()
    assert "raises TypeError: list indices must be integers" in message[0]
    assert message[0].endswith('`worst = scores["largest"]`')
    assert message[1] == "  my_keep([0.2, 0.5])"


def test_a_changed_argument_is_named():
    def my_labels(prompt_ids, answer_ids, eos_id):
        answer_ids.append(eos_id)
        return day1.labels(prompt_ids, answer_ids[:-1], eos_id)

    assert "changes its argument `answer_ids`" in run("E1.4", my_labels).message


def test_a_changed_tensor_is_named():
    def my_loss(logits, labels):
        loss = day1.response_loss(logits, labels)
        labels[labels == -100] = 0
        return loss

    assert "changes its argument `labels`" in run("E1.7", my_loss).message


def test_wrong_arguments_are_told_the_right_ones():
    assert "must take these arguments: lengths, capacity" in run("E1.6", lambda lengths: []).message


def test_a_forgotten_return_is_asked_for():
    assert "None, expected a list: does your function end with `return`?" in run("E1.6", lambda lengths, capacity: None).message


def test_a_result_in_place_of_the_function_is_recognised():
    assert run("E1.3", True).message == 'E1.3: found True or False, expected your function: check("E1.3", my_function)'


def test_a_loop_without_end_is_stopped_and_the_signal_handler_put_back():
    import signal

    before = signal.getsignal(signal.SIGALRM)
    assert "stopped after 1 seconds" in run("E1.1", endless).message
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_check_works_outside_the_main_thread():
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(run("E1.1", day1.next_word)))
    thread.start()
    thread.join()
    assert verdicts[0].passed


def test_printing_does_not_hide_the_verdict(capsys):
    def talkative(scores):
        print("scores:", scores)
        return day1.keep(scores)

    checks.check("E1.3", talkative)
    assert capsys.readouterr().out == "E1.3 passed\n"


def test_the_users_interrupt_goes_through():
    def interrupted(scores):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("E1.3", interrupted)


@pytest.mark.parametrize("name", NAMES)
def test_a_verdict_is_the_same_every_time(name):
    assert run(name, lambda *a: 0) == run(name, lambda *a: 0)
    assert run(name, find(name).reference).message == f"{name} passed"


@pytest.mark.parametrize("name", NAMES)
def test_the_right_answer_to_the_first_case_alone_does_not_pass(name):
    import random

    exercise = find(name)
    first = next(exercise.cases(random.Random(name)))
    answer = exercise.reference(*first)
    assert not run(name, lambda *arguments: answer).passed


def test_tuples_tensors_and_arrays_are_read_as_lists():
    assert checks.plain((torch.ones(2, dtype=torch.int64), {"a": torch.zeros(1).numpy()})) == [[1, 1], {"a": [0.0]}]
    assert run("E1.5", lambda rows, pad_id: [torch.tensor(part) for part in day1.pad(rows, pad_id)]).passed
    assert run("E1.5", lambda rows, pad_id: (day1.pad(rows, pad_id)[0], torch.tensor(day1.pad(rows, pad_id)[1]).bool())).passed


def test_the_global_generators_are_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for name in NAMES:
        run(name, find(name).reference)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_difference_is_drawn_in_columns():
    message = run("E1.4", lambda prompt, answer, eos: ([*prompt, *answer, eos], [0, -100, -100, -100, *answer, eos])).message
    assert message.splitlines()[2:] == [
        "  found        0 -100 -100 -100 21 22 0",
        "  expected  -100 -100 -100 -100 21 22 0",
        "               ^",
    ]


def test_tensors_within_a_list_are_named_by_their_shape():
    message = run("E2.7", lambda weight, adapters, shares: weight).message
    adapters = "[(<tensor 2 x 4>, <tensor 3 x 2>, 6), (<tensor 2 x 4>, <tensor 3 x 2>, 6)]"
    assert message.splitlines()[1] == f"  <lambda>(<tensor 3 x 4>, {adapters}, [0.5, 0.25])"


def test_a_learner_who_turns_autograd_off_is_answered_all_the_same():
    def my_gradients(x, upstream, a, b, alpha):
        torch.set_grad_enabled(False)
        return torch.zeros_like(a), torch.zeros_like(b)

    try:
        assert "your gradient of a is zero" in run("E2.4", my_gradients).message
    finally:
        torch.set_grad_enabled(True)


def test_our_rouge_l_is_that_of_the_package():
    import random

    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    draw = random.Random(0)
    for _ in range(200):
        pair = [draw.choices("abcdef", k=draw.randint(0, 15)) for _ in range(2)]
        expected = scorer.score(" ".join(pair[0]), " ".join(pair[1]))["rougeL"].fmeasure
        assert day1.rouge_l(*pair) == pytest.approx(expected, abs=1e-12)
