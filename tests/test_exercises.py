"""Tests of the exercises, taken out of the notebooks: solutions pass, stubs do not, mutants are
refused.

The solutions stand only in the notebooks, folded. Mutants are made by operators over the solution's
syntax tree, one change in one place each. Wrong answers and their sentences are in
tests/test_checks.py.
"""

import ast
import copy
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest

from course_lib import checks
from course_lib.checks import diagnosis
from tools import notebooks

REPOSITORY = Path(__file__).parents[1]
DAYS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


@dataclass(frozen=True)
class InNotebook:
    """One exercise as the learner finds it."""

    day: Path
    function: str
    label: str
    stub: str
    folded: str

    @property
    def solution(self):
        return re.search(r"```python\n(.*?)```", self.folded, re.S)[1]

    def function_of(self, source):
        """The function that `source` defines, with the names that the notebook's import cell
        brings.
        """
        names = {}
        exec(
            next(
                cell.source
                for cell in cells_of(self.day)
                if re.search("from course_lib import .*checks", cell.source)
            ),
            names,
        )
        exec(source, names)
        return names[self.function]


def cells_of(path):
    return nbformat.read(path, as_version=4).cells


def exercises_of(path):
    """A core exercise has `checks.use` below its stub, another one a cell with `checks.check`."""
    cells = cells_of(path)
    for i, cell in enumerate(cells):
        match = re.search(
            r'^(?:\w+ = checks\.use|checks\.check)\("(E\d\.\d+)", (\w+)\)$', cell.source, re.M
        )
        if cell.cell_type == "code" and match:
            stub = cell.source[: match.start()].strip()
            label = cells[i - 1 if stub else i - 2].source
            stub = stub or cells[i - 1].source
            yield match[1], InNotebook(path, match[2], label, stub, cells[i + 1].source)


EXERCISES = {name: exercise for path in DAYS for name, exercise in exercises_of(path)}


def test_notebooks_and_checks_hold_the_same_exercises():
    assert list(EXERCISES) == list(checks.exercises())  # in the order of the notebook, too


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercise_has_its_label_hints_and_a_folded_solution(name):
    exercise = EXERCISES[name]
    label = (
        rf"\*\*Exercise {re.escape(name)}\*\* · (core · |optional · )?\d+ minutes · "
        r"difficulty [●○]{3} · "
        r"(about )?\d+ lines?\n\n"
    )
    assert re.match(label, exercise.label)
    assert "Why it matters:" in exercise.label
    assert exercise.stub.endswith("raise NotImplementedError")
    assert exercise.folded.startswith("<details><summary>Hints</summary>\n\n- *")
    assert "</details>\n\n<details><summary>Solution</summary>\n\n```python\n" in exercise.folded
    assert exercise.folded.endswith("</details>")
    assert exercise.solution.splitlines()[0] == exercise.stub.splitlines()[0]


@pytest.mark.parametrize("path", DAYS, ids=lambda path: path.stem)
def test_the_head_of_a_day_counts_the_minutes_of_its_exercises(path):
    minutes = {"core": 0, "other": 0}
    for _, exercise in exercises_of(path):
        kind = "core" if " · core · " in exercise.label else "other"
        minutes[kind] += int(re.search(r"(\d+) minutes", exercise.label)[1])
    head = cells_of(path)[0].source
    assert f"exercises take another {minutes['other']}" in head
    assert not minutes["core"] or f"core exercises ({minutes['core']} minutes)" in head


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_passes_and_the_stub_is_not_done_yet(name):
    exercise = EXERCISES[name]
    assert diagnosis(name, exercise.function_of(exercise.solution)) is None
    assert diagnosis(name, exercise.function_of(exercise.stub)) == "not done yet"


# Mutants that compute the same as the solution, and why: numbers may be added, and the larger
# taken, in any order.
EQUIVALENT = {
    "E1.4": {"0 -> -1"},  # of one group of weights
    "E1.5": {"i + n -> n + i"},
    "E1.6": {
        "len(second) + 1 -> 1 + len(second)",
        "above[j] + 1 -> 1 + above[j]",
        "j + 1 -> 1 + j",
        "len(first) + len(second) -> len(second) + len(first)",
        "max(row[j], above[j + 1]) -> max(above[j + 1], row[j])",
        "max(1, len(first) + len(second)) -> max(len(first) + len(second), 1)",
        # one more zero in a row of zeros; or one word compared with none, which gives 0 all the
        # same
        "1 -> 2",
    },
    "E1.8": {"sum(row) + length -> length + sum(row)"},
    "E1.10": {
        "weights_and_gradients + moments -> moments + weights_and_gradients",
        "weights_and_gradients + moments + (4 if master_copy else 0) -> "
        "(4 if master_copy else 0) + (weights_and_gradients + moments)",
    },
    "E2.1": {"base(x) + scale * (x @ a.T @ b.T) -> scale * (x @ a.T @ b.T) + base(x)"},
    "E2.4": {"weight + alpha / len(a) * b @ a -> alpha / len(a) * b @ a + weight"},
    "E2.6": {"rows + columns -> columns + rows"},
    "E2.8": {
        "rows + columns -> columns + rows",
        "min(budget // rank_one, min((min(shape) for shape in shapes))) -> "
        "min(min((min(shape) for shape in shapes)), budget // rank_one)",
    },
    "E3.1": {
        "torch.eye(len(singular)).to(P) -> torch.eye(len(singular))",  # on a CPU
        "(P.T @ P - identity).norm() + (Q @ Q.T - identity).norm() -> "
        "(Q @ Q.T - identity).norm() + (P.T @ P - identity).norm()",
        "P.T @ P - identity -> identity - P.T @ P",
        "Q @ Q.T - identity -> identity - Q @ Q.T",
    },
    "E3.2": {
        "0.85 * sensitivity + 0.15 * importance -> 0.15 * importance + 0.85 * sensitivity",
        "0.85 * uncertainty + 0.15 * (importance - sensitivity).abs() -> "
        "0.15 * (importance - sensitivity).abs() + 0.85 * uncertainty",
        "importance - sensitivity -> sensitivity - importance",
    },
    "E3.3": {
        "min(max(done, 0), 1) -> min(1, max(done, 0))",
        "max(done, 0) -> max(0, done)",
        "target + (start - target) * left ** 3 -> (start - target) * left ** 3 + target",
    },
    "E3.5": {  # more directions than are kept
        "torch.linalg.svd(B @ A, full_matrices=False) -> torch.linalg.svd(B @ A)",
        "False -> True",
    },
    "E3.6": {
        "rows + columns + 1 -> 1 + (rows + columns)",
        "rows + columns -> columns + rows",
    },
    "E4.1": {
        "1e-38 -> 2e-38",
        "scaled.flatten()[:, None] - levels -> levels - scaled.flatten()[:, None]",  # then abs
    },
    "E4.2": {
        # of 1 - p the quantile is the same with another sign, and all are divided by the last
        "0.5 + (outermost - 0.5) * i / count -> 0.5 - (outermost - 0.5) * i / count",
        "outermost - 0.5 -> 0.5 - outermost",
        "0.5 + (outermost - 0.5) * i / count -> (outermost - 0.5) * i / count + 0.5",
        "count + 1 -> 1 + count",
    },
    "E4.4": {
        "torch.stack([packed >> 4, packed & 15], 1).flatten() -> "
        "torch.stack([packed >> 4, packed & 15], 1)",  # a view follows
        "x @ weight.T + scale * (x @ A.T) @ B.T -> scale * (x @ A.T) @ B.T + x @ weight.T",
        "packed & 15 -> 15 & packed",
    },
    "E4.6": {
        "4 + 8 / block_size + 32 / (block_size * second_block) -> "
        "32 / (block_size * second_block) + (4 + 8 / block_size)",
        "4 + 8 / block_size -> 8 / block_size + 4",
    },
    "E4.7": {"return None -> pass"},
    "E5.2": {
        "keys.transpose(-1, -2) -> keys.transpose(-2, -1)",
        "scores + nn.functional.pad(mask, (count, 0)) -> "
        "nn.functional.pad(mask, (count, 0)) + scores",
        "-2 -> 2",  # of four dimensions
    },
    "E5.3": {
        "h + torch.relu(h @ down.T + down_bias) @ up.T + up_bias -> "
        "up_bias + (h + torch.relu(h @ down.T + down_bias) @ up.T)",
        "h + torch.relu(h @ down.T + down_bias) @ up.T -> "
        "torch.relu(h @ down.T + down_bias) @ up.T + h",
        "h @ down.T + down_bias -> down_bias + h @ down.T",
    },
    "E5.6": {
        "tokens * kv + (kv + 1) * hidden + (hidden + 1) * wide -> "
        "(hidden + 1) * wide + (tokens * kv + (kv + 1) * hidden)",
        "tokens * kv + (kv + 1) * hidden -> (kv + 1) * hidden + tokens * kv",
        "hidden + 1 -> 1 + hidden",
        "kv + 1 -> 1 + kv",
    },
}
SWAPS = {
    ast.Add: [ast.Sub],
    ast.Sub: [ast.Add],
    ast.Mult: [ast.Div],
    ast.Div: [ast.Mult],
    ast.FloorDiv: [ast.Div],
    ast.Pow: [ast.Mult],
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.And: [ast.Or],
    ast.Or: [ast.And],
}
OTHER_NAMES = {
    "all": "any",
    "any": "all",
    "max": "min",
    "min": "max",
    "sum": "len",
    "mean": "sum",
    "exp": "log",
}


def changed(node, **fields):
    new = copy.copy(node)
    for field, value in fields.items():
        setattr(new, field, value)
    return new


def replacements(node):
    """What may stand in place of a node, one change each."""
    match node:
        case ast.BinOp():
            yield from (changed(node, op=operator()) for operator in SWAPS.get(type(node.op), []))
            yield from (node.left, node.right)  # a dropped term
            if not isinstance(node.op, ast.Mult):
                yield changed(node, left=node.right, right=node.left)
        case ast.BoolOp():
            yield from (changed(node, op=operator()) for operator in SWAPS[type(node.op)])
        case ast.Compare():
            yield from (
                changed(node, ops=[operator()]) for operator in SWAPS.get(type(node.ops[0]), [])
            )
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield from (ast.Constant(value + 1), ast.Constant(value - 1), ast.Constant(value * 2))
        case ast.UnaryOp():
            yield node.operand
        case ast.Slice():
            yield ast.Slice(node.upper, node.lower)  # [:-1] becomes [-1:]
            yield ast.Slice(None, None)
            yield ast.Slice(node.lower, node.upper, ast.UnaryOp(ast.USub(), ast.Constant(1)))
        case ast.Call():
            if len(node.args) > 1:
                yield changed(node, args=[node.args[1], node.args[0], *node.args[2:]])
            if node.keywords:
                yield changed(node, keywords=[])
            if isinstance(node.func, ast.Attribute):
                yield node.func.value  # a method that is not called
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if called in OTHER_NAMES:
                name = {"id" if isinstance(node.func, ast.Name) else "attr": OTHER_NAMES[called]}
                yield changed(node, func=changed(node.func, **name))
        case ast.Attribute(attr="T"):
            yield node.value  # a matrix that is not transposed
        case ast.IfExp():
            yield from (changed(node, body=node.orelse, orelse=node.body), node.body, node.orelse)
        case ast.Tuple(ctx=ast.Load()) | ast.List(ctx=ast.Load()) if len(node.elts) > 1:
            yield changed(node, elts=node.elts[::-1])
        case ast.comprehension() if node.ifs:
            yield changed(node, ifs=[])
        case ast.For() if node.orelse:
            yield from (ast.Pass(), changed(node, orelse=[]))
        case ast.Assign() | ast.Expr() | ast.Break() | ast.Return():
            yield ast.Pass()


def text_of(node):
    if isinstance(node, ast.Slice):  # ast.unparse does not take it alone
        node = ast.Subscript(ast.Name("x", ast.Load()), node, ast.Load())
    return (ast.unparse(ast.fix_missing_locations(node)).splitlines() or ["nothing"])[0].strip()


def mutants_of(source):
    """What was changed, and the source, of every mutant that differs from `source`."""
    tree, seen = ast.parse(source), {ast.unparse(ast.parse(source))}
    for place, node in enumerate(ast.walk(tree)):
        for new in replacements(node):
            mutant = copy.deepcopy(tree)
            Replace(list(ast.walk(mutant))[place], copy.deepcopy(new)).visit(mutant)
            mutated = ast.unparse(ast.fix_missing_locations(mutant))
            if mutated not in seen:
                seen.add(mutated)
                yield f"{text_of(node)} -> {text_of(new)}", mutated


class Replace(ast.NodeTransformer):
    def __init__(self, old, new):
        self.old, self.new = old, new

    def visit(self, node):
        return self.new if node is self.old else self.generic_visit(node)


@pytest.mark.parametrize("name", EXERCISES)
def test_mutants_of_the_solution_are_refused(name, monkeypatch, record_property):
    monkeypatch.setattr(checks, "SECONDS", 2.0)  # for mutants that never end
    exercise, same = EXERCISES[name], EQUIVALENT.get(name, set())
    mutants = list(mutants_of(exercise.solution))
    survivors = [
        what for what, source in mutants if diagnosis(name, exercise.function_of(source)) is None
    ]
    assert same <= {*survivors}, "listed as equivalent, but refused or not made"
    different = [what for what in survivors if what not in same]
    total = len(mutants) - len(survivors) + len(different)
    record_property("refused", f"{total - len(different)} of {total}")
    assert total >= 5
    assert len(different) <= 0.05 * total, different


@pytest.mark.parametrize("path", DAYS, ids=lambda path: path.stem)
def test_each_quiz_question_has_one_right_answer_and_explains_all_four(path):
    questions = [cell.source for cell in cells_of(path) if cell.source.startswith("**Question ")]
    assert [re.match(r"\*\*Question (\d)\.\*\*", source)[1] for source in questions] == list(
        "12345"
    )
    right = []
    for source in questions:
        asked, folded = source.split("<details><summary>Answer</summary>\n\n")
        right += re.findall(r"\*\*Right: ([a-d])\*\*", source)
        explained = dict(re.findall(r"^- \*\*([a-d])\)\*\* (Right|Wrong)\. ", folded, re.M))
        assert re.findall(r"^- \*\*([a-d])\)\*\* ", asked, re.M) == list("abcd")
        assert explained == {
            letter: "Right" if letter == right[-1] else "Wrong" for letter in "abcd"
        }
        assert folded.endswith("</details>")
        assert "Right" not in asked
    assert len(right) == 5
    assert len(set(right)) >= 3, "the right answer stands at the same place too often"


def texts(cell):
    """What a cell printed and showed, without pictures."""
    shown = [
        output.get("text") or output.get("data", {}).get("text/html") for output in cell.outputs
    ]
    return "".join(filter(None, shown))


@pytest.mark.slow
@pytest.mark.parametrize("path", DAYS, ids=lambda path: path.stem)
def test_with_every_stub_solved_a_day_prints_the_same(path, tmp_path):
    committed, solved = nbformat.read(path, as_version=4), nbformat.read(path, as_version=4)
    for _, exercise in exercises_of(path):
        for cell in solved.cells:
            cell.source = cell.source.replace(exercise.stub, exercise.solution.strip())
    nbformat.write(solved, tmp_path / path.name)
    execution = notebooks.execute(tmp_path / path.name)
    assert execution.failure == ""
    printed = "\n".join(map(texts, filter(is_code, execution.notebook.cells)))
    assert printed.count("passed") == len([*exercises_of(path)])
    for before, after in zip(committed.cells, execution.notebook.cells, strict=True):
        tagged = "nbval-ignore-output" in before.metadata.get("tags", [])
        if is_code(before) and not tagged and "checks." not in before.source:
            assert texts(after) == texts(before), before.source


def is_code(cell):
    return cell.cell_type == "code"
