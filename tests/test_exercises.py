"""Tests of the exercises, taken out of the notebooks: solutions pass, stubs and wrong answers do not, mutants are refused.

The solutions stand only in the notebooks, folded. Wrong answers are planted here by hand, each with the words that its diagnosis
must contain. Mutants are made by operators over the solution's syntax tree: one change in one place each.
"""

import ast
import copy
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest

from course_lib import checks
from course_lib.checks import run

DAYS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@dataclass(frozen=True)
class InNotebook:
    """One exercise as the learner finds it."""

    function: str
    stub: str
    solution: str
    label: str
    folded: str


def exercises_of(path):
    cells = nbformat.read(path, as_version=4).cells
    found = {}
    for i, cell in enumerate(cells):
        match = re.match(r'checks\.check\("(E\d\.\d+)", (\w+)\)$', cell.source)
        if cell.cell_type == "code" and match:
            solution = re.search(r"```python\n(.*?)```", cells[i + 1].source, re.S).group(1)
            found[match[1]] = InNotebook(match[2], cells[i - 1].source, solution, cells[i - 2].source, cells[i + 1].source)
    return found


def imports_of(path):
    """The names that a cell of this notebook can use: what its import cell brings, nothing else."""
    cells = nbformat.read(path, as_version=4).cells
    names = {}
    exec(next(cell.source for cell in cells if re.search("from course_lib import .*checks", cell.source)), names)
    return names


EXERCISES = {name: exercise for path in DAYS for name, exercise in exercises_of(path).items()}


@pytest.fixture(scope="module")
def names():
    return {f"E{path.stem[3]}": imports_of(path) for path in DAYS}


def function_of(source, name, names):
    scope = dict(names[name.partition(".")[0]])
    exec(source, scope)
    return scope[EXERCISES[name].function]


def test_notebooks_and_checks_hold_the_same_exercises():
    declared = [name for day in checks.DAYS for name in __import__(f"course_lib.checks.{day}", fromlist=["x"]).EXERCISES]
    assert list(EXERCISES) == declared  # in the order of the notebook, too


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercise_has_its_label_hints_and_a_folded_solution(name):
    exercise = EXERCISES[name]
    label = rf"\*\*Exercise {re.escape(name)}\*\* · \d+ minutes · difficulty [●○]{{3}} · (about )?\d+ lines?\n\n"
    assert re.match(label, exercise.label)
    assert "Why it matters:" in exercise.label
    assert exercise.stub.endswith("raise NotImplementedError")
    assert exercise.folded.startswith("<details><summary>Hints</summary>\n\n- *")
    assert "</details>\n\n<details><summary>Solution</summary>\n\n```python\n" in exercise.folded
    assert exercise.folded.endswith("</details>")
    assert exercise.solution.splitlines()[0] == exercise.stub.splitlines()[0]


@pytest.mark.parametrize("path", DAYS, ids=lambda path: path.stem)
def test_the_head_of_a_day_counts_the_minutes_of_its_exercises(path):
    minutes = sum(int(re.search(r"(\d+) minutes", exercise.label)[1]) for exercise in exercises_of(path).values())
    assert f"exercises take another {minutes}" in nbformat.read(path, as_version=4).cells[0].source


def test_later_cells_do_not_need_a_learners_function():
    for path in DAYS:
        for exercise in exercises_of(path).values():
            users = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
            assert sum(bool(re.search(rf"\b{exercise.function}\b", cell.source)) for cell in users) == 2, exercise.function


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_passes(name, names):
    assert run(name, function_of(EXERCISES[name].solution, name, names)).message == f"{name} passed"


@pytest.mark.parametrize("name", EXERCISES)
def test_the_stub_is_not_done_yet(name, names):
    assert run(name, function_of(EXERCISES[name].stub, name, names)).message == f"{name} not done yet"


# name of the exercise -> what the diagnosis must contain -> the body of a plausible wrong answer
WRONG = {
    "E1.1": {
        "your values are counts": """
            n = len(history)
            return dict(Counter(words[i + n] for i in range(len(words) - n) if words[i : i + n] == history))""",
        "whatever stands before": "return {word: words.count(word) / len(words) for word in words}",
        "your probabilities sum to": """
            n = len(history)
            counts = Counter(words[i + n] for i in range(len(words) - n) if words[i : i + n] == history)
            return {word: count / len(words) for word, count in counts.items()}""",
        "only at the last word": """
            counts = Counter(b for a, b in zip(words, words[1:]) if [a] == history[-1:])
            return {word: count / counts.total() for word, count in counts.items()}""",
        "the words before the history": """
            n = len(history)
            counts = Counter(words[i - 1] for i in range(1, len(words)) if words[i : i + n] == history)
            return {word: count / counts.total() for word, count in counts.items()}""",
        "are rounded": """
            n = len(history)
            counts = Counter(words[i + n] for i in range(len(words) - n) if words[i : i + n] == history)
            return {word: round(count / counts.total(), 2) for word, count in counts.items()}""",
        "IndexError": """
            n = len(history)
            counts = Counter(words[i + n] for i in range(len(words)) if words[i : i + n] == history)
            return {word: count / counts.total() for word, count in counts.items()}""",
        "histories may overlap": """
            n, i, counts = len(history), 0, Counter()
            while i < len(words) - n:
                if words[i : i + n] == history:
                    counts[words[i + n]] += 1
                    i += n
                i += 1
            return {word: count / counts.total() for word, count in counts.items()}""",
        "must give {}": """
            n = len(history)
            counts = Counter(words[i + n] for i in range(len(words) - n) if words[i : i + n] == history)
            return {word: count / counts.total() for word, count in counts.items()} or {word: 1 / len(words) for word in words}""",
    },
    "E1.2": {
        "the first match each time": """
            place = count = 0
            for word in first:
                if word in second[place:]:
                    place = second.index(word, place) + 1
                    count += 1
            return 2 * count / max(1, len(first) + len(second))""",
        "ignore the order": """
            common = sum((Counter(first) & Counter(second)).values())
            return 2 * common / max(1, len(first) + len(second))""",
        "allow no gaps": """
            best = 0
            for i in range(len(first)):
                for j in range(len(second)):
                    k = 0
                    while i + k < len(first) and j + k < len(second) and first[i + k] == second[j + k]:
                        k += 1
                    best = max(best, k)
            return 2 * best / max(1, len(first) + len(second))""",
        "you compare sets": """
            union = set(first) | set(second)
            return len(set(first) & set(second)) / len(union) if union else 0.0""",
        "length of the subsequence": "return float(LCS)",
        "a precision": "return LCS / max(1, len(first))",
        "a recall": "return LCS / max(1, len(second))",
        "half of what it should be": "return LCS / max(1, len(first) + len(second))",
        "at the same place": "return 2 * sum(a == b for a, b in zip(first, second)) / max(1, len(first) + len(second))",
        "ZeroDivisionError": "return 2 * LCS / (len(first) + len(second))",
        "an empty list must give 0": "return 2 * LCS / (len(first) + len(second)) if first or second else 1.0",
    },
    "E1.3": {
        "the largest score counts": "return any(score < 0.7 for score in scores) or not scores",
        "the largest score counts, not the mean": "return not scores or sum(scores) / len(scores) < 0.7",
        "exactly 0.7 is refused": "return all(score <= 0.7 for score in scores)",
        "the candidate is kept: expected True": "return bool(scores) and max(scores) < 0.7",
        "one score, 0.90, is not below 0.7": "return True",
        "all scores are below 0.7": "return all(score > 0.7 for score in scores)",
        "the candidate is kept": "return all(score < 0.5 for score in scores)",
        "ValueError": "return max(scores) < 0.7",
        "is a list, expected True or False": "return [score for score in scores if score < 0.7]",
    },
    "E1.4": {
        "your labels keep the prompt": "ids = prompt_ids + answer_ids + [eos_id]; return ids, ids",
        "append eos_id": "return prompt_ids + answer_ids, [-100] * len(prompt_ids) + answer_ids",
        "EOS is trained": """
            ids = prompt_ids + answer_ids + [eos_id]
            return ids, [-100] * len(prompt_ids) + answer_ids + [-100]""",
        "shifted by one": """
            ids = prompt_ids + answer_ids + [eos_id]
            return ids, [-100] * (len(prompt_ids) - 1) + answer_ids + [eos_id, -100]""",
        "same length": "return prompt_ids + answer_ids + [eos_id], answer_ids + [eos_id]",
        "labels are 0, expected -100": """
            ids = prompt_ids + answer_ids + [eos_id]
            return ids, [0] * len(prompt_ids) + answer_ids + [eos_id]""",
        "mask by position": """
            ids = prompt_ids + answer_ids + [eos_id]
            labels = [-100] * len(prompt_ids) + [-100 if t in prompt_ids else t for t in answer_ids] + [eos_id]
            return ids, labels""",
        "the prompt is not masked as a whole": """
            ids = prompt_ids + answer_ids + [eos_id]
            return ids, [-100] * (len(prompt_ids) - 1) + ids[len(prompt_ids) - 1 :]""",
        "changes its argument `answer_ids`": """
            answer_ids.append(eos_id)
            return prompt_ids + answer_ids, [-100] * len(prompt_ids) + answer_ids""",
        "expected two lists": "return prompt_ids + answer_ids + [eos_id]",
    },
    "E1.5": {
        "made by token id": """
            longest = max(map(len, rows))
            ids = [row + [pad_id] * (longest - len(row)) for row in rows]
            return ids, [[int(token != pad_id) for token in row] for row in ids]""",
        "pad on the left": """
            longest = max(map(len, rows))
            ids = [[pad_id] * (longest - len(row)) + row for row in rows]
            return ids, [[0] * (longest - len(row)) + [1] * len(row) for row in rows]""",
        "cut to the shortest": """
            shortest = min(map(len, rows))
            return [row[:shortest] for row in rows], [[1] * shortest for row in rows]""",
        "inverted": """
            longest = max(map(len, rows))
            ids = [row + [pad_id] * (longest - len(row)) for row in rows]
            return ids, [[0] * len(row) + [1] * (longest - len(row)) for row in rows]""",
        "reads the padding": """
            longest = max(map(len, rows))
            ids = [row + [pad_id] * (longest - len(row)) for row in rows]
            return ids, [[1] * longest for row in rows]""",
        "your padding is not pad_id": """
            longest = max(map(len, rows))
            ids = [row + [-100] * (longest - len(row)) for row in rows]
            return ids, [[1] * len(row) + [0] * (longest - len(row)) for row in rows]""",
        "expected all to be": """
            longest = len(rows[-1])
            ids = [row + [pad_id] * (longest - len(row)) for row in rows]
            return ids, [[1] * len(row) + [0] * (longest - len(row)) for row in rows]""",
        "changes its argument `rows`": """
            longest = max(map(len, rows))
            mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
            for row in rows:
                row += [pad_id] * (longest - len(row))
            return rows, mask""",
    },
    "E1.6": {
        "a row for every length": "return [[length] for length in sorted(lengths, reverse=True)]",
        "you take the lengths as they come": """
            rows = []
            for length in lengths:
                row = next((row for row in rows if sum(row) + length <= capacity), None)
                rows.append([length]) if row is None else row.append(length)
            return rows""",
        "you begin with the shortest": """
            rows = []
            for length in sorted(lengths):
                row = next((row for row in rows if sum(row) + length <= capacity), None)
                rows.append([length]) if row is None else row.append(length)
            return rows""",
        "exactly full": """
            rows = []
            for length in sorted(lengths, reverse=True):
                row = next((row for row in rows if sum(row) + length < capacity), None)
                rows.append([length]) if row is None else row.append(length)
            return rows""",
        "only in the last row": """
            rows = [[]]
            for length in sorted(lengths, reverse=True):
                if sum(rows[-1]) + length > capacity:
                    rows.append([])
                rows[-1].append(length)
            return rows if lengths else []""",
        "in the order in which they were opened": """
            rows = []
            for length in sorted(lengths, reverse=True):
                row = min((row for row in rows if sum(row) + length <= capacity), key=sum, default=None)
                rows.append([length]) if row is None else row.append(length)
            return rows""",
        "more than the capacity": """
            rows = []
            for length in sorted(lengths, reverse=True):
                row = next((row for row in rows if sum(row) < capacity), None)
                rows.append([length]) if row is None else row.append(length)
            return rows""",
        "each length stands in exactly one row": """
            rows = []
            for length in sorted(lengths, reverse=True):
                for row in rows:
                    if sum(row) + length <= capacity:
                        row.append(length)
                else:
                    rows.append([length])
            return rows""",
        "changes its argument `lengths`": """
            lengths.sort(reverse=True)
            rows = []
            for length in lengths:
                row = next((row for row in rows if sum(row) + length <= capacity), None)
                rows.append([length]) if row is None else row.append(length)
            return rows""",
        "an empty row": """
            rows = [[]]
            for length in sorted(lengths, reverse=True):
                row = next((row for row in rows if sum(row) + length <= capacity), None)
                rows.append([length]) if row is None else row.append(length)
            return rows""",
    },
    "E1.7": {
        "you shift twice": """
            targets = labels[:, 2:]
            trained = targets != -100
            return -logits[:, :-2].log_softmax(-1)[trained].gather(1, targets[trained].unsqueeze(1)).mean()""",
        "counted as token 0": """
            targets = labels[:, 1:].clamp(min=0)
            return -logits[:, :-1].log_softmax(-1).gather(2, targets.unsqueeze(2)).mean()""",
        "before the shift": """
            targets = labels[:, 1:]
            trained = labels[:, :-1] != -100
            return -logits[:, :-1].log_softmax(-1)[trained].gather(1, targets[trained].clamp(min=0).unsqueeze(1)).mean()""",
        "the wrong dimension: over": """
            targets = labels[:, 1:]
            trained = targets != -100
            return -logits[:, :-1].log_softmax(1)[trained].gather(1, targets[trained].unsqueeze(1)).mean()""",
        "position t with token t": "return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())",
        "shift goes the wrong way": """
            return torch.nn.functional.cross_entropy(logits[:, 1:].flatten(0, 1), labels[:, :-1].flatten())""",
        "your loss is a sum": """
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")""",
        "you divide by all positions": """
            each = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
            return each.mean()""",
        "a mean of row means": """
            each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
            return (each.sum(1) / (labels[:, 1:] != -100).sum(1).clamp(min=1)).mean()""",
        "wrong sign": "return -torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())",
        "overflows": """
            kept = labels[:, 1:] != -100
            p = logits.exp() / logits.exp().sum(-1, keepdim=True)
            return -p[:, :-1][kept].gather(1, labels[:, 1:][kept].unsqueeze(1)).log().mean()""",
        "in bits": """
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            return loss / math.log(2)""",
        "mean of probabilities": """
            kept = labels[:, 1:] != -100
            return -logits.softmax(-1)[:, :-1][kept].gather(1, labels[:, 1:][kept].unsqueeze(1)).mean()""",
        "mean of logits": """
            kept = labels[:, 1:] != -100
            return -logits[:, :-1][kept].gather(1, labels[:, 1:][kept].unsqueeze(1)).mean()""",
        "wrong dimension": """
            kept = labels[:, 1:] != -100
            return -logits.log_softmax(1)[:, :-1][kept].gather(1, labels[:, 1:][kept].unsqueeze(1)).mean()""",
        "raises": "return -logits.log_softmax(-1)[:, :-1].gather(2, labels[:, 1:].unsqueeze(2)).mean()",
    },
    "E1.8": {
        "you return the mean loss": "t = sum(losses, []); return sum(t) / len(t)",
        "sign of the exponent": "t = sum(losses, []); return math.exp(-sum(t) / len(t))",
        "power of 2": "t = sum(losses, []); return 2 ** (sum(t) / len(t))",
        "exponential of the sum": "return math.exp(sum(sum(losses, [])))",
        "average the answers' mean losses": """
            means = [sum(answer) / len(answer) for answer in losses if answer]
            return math.exp(sum(means) / len(means))""",
        "average the exponentials": "t = sum(losses, []); return sum(map(math.exp, t)) / len(t)",
        "average the perplexities": """
            each = [math.exp(sum(answer) / len(answer)) for answer in losses if answer]
            return sum(each) / len(each)""",
        "the mean loss of": "t = sum(losses, []); return math.exp(sum(t) / (len(t) - 1))",
    },
    "E1.9": {
        "moment 2 one is missing": "return parameters * (2 * bytes_per_number + 4 + (4 if master_copy else 0))",
        "moments are float32": "return parameters * (4 * bytes_per_number + (4 if master_copy else 0))",
        "of weights, gradients, moment 1": "return parameters * (bytes_per_number + 8 + (4 if master_copy else 0))",
        "master copy of 4 bytes is missing": "return parameters * (2 * bytes_per_number + 8)",
        "4 bytes too many": "return parameters * (2 * bytes_per_number + 12)",
        "the weights alone": "return parameters * bytes_per_number",
        "moments are missing": "return parameters * (2 * bytes_per_number + (4 if master_copy else 0))",
        "not a larger unit": "return parameters * (2 * bytes_per_number + 8 + (4 if master_copy else 0)) / 1e9",
        "one byte is eight bits": "return 8 * parameters * (2 * bytes_per_number + 8 + (4 if master_copy else 0))",
        "not always 4": "return parameters * (16 + (4 if master_copy else 0))",
    },
    "E2.1": {
        "add the singular values themselves": """
            k = 0
            while sum(singular_values[:k]) < share * sum(singular_values):
                k += 1
            return k""",
        "you compare lengths": """
            lengths = [math.sqrt(sum(v**2 for v in singular_values[:k])) for k in range(len(singular_values) + 1)]
            return next(k for k, length in enumerate(lengths) if length >= share * lengths[-1])""",
        "one too small": """
            held, total = 0, sum(v**2 for v in singular_values)
            for k, value in enumerate(singular_values):
                held += value**2
                if held >= share * total:
                    return k
            return 0""",
        "one too large": """
            k, squares = 0, [v**2 for v in singular_values]
            while sum(squares[:k]) < share * sum(squares):
                k += 1
            return k + 1""",
        "exactly the share, and that is enough": """
            k, squares = 0, [v**2 for v in singular_values]
            while k < len(squares) and sum(squares[:k]) <= share * sum(squares):
                k += 1
            return k""",
        "begin with the smallest": """
            k, squares = 0, sorted(v**2 for v in singular_values)
            while sum(squares[:k]) < share * sum(squares):
                k += 1
            return k""",
        "the rest holds the share": """
            k, squares = 0, [v**2 for v in singular_values]
            while sum(squares[:k]) < (1 - share) * sum(squares):
                k += 1
            return k""",
        "compare each value with the largest": "return sum(v**2 >= share * singular_values[0] ** 2 for v in singular_values)",
        "a share of the number of values": "return math.ceil(share * len(singular_values))",
        "the number of all values": "return len(singular_values)",
        "holds everything with no direction": """
            k, squares = 1, [v**2 for v in singular_values]
            while sum(squares[:k]) < share * sum(squares):
                k += 1
            return k""",
        "ZeroDivisionError": """
            squares = [v**2 for v in singular_values]
            return next(k for k in range(len(squares) + 1) if sum(squares[:k]) / sum(squares) >= share)""",
        "the first 0 hold 0.0% of the sum": """
            k, squares = 0, [v**2 for v in singular_values]
            for part in squares:
                if sum(squares[:k]) >= share * sum(squares):
                    break
            return k""",
    },
    "E2.2": {
        "these are the A's alone": "return sum(rank * columns for rows, columns in shapes)",
        "these are the B's alone": "return sum(rank * rows for rows, columns in shapes)",
        "which are frozen": "return sum(rows * columns for rows, columns in shapes)",
        "the matrices themselves are frozen": "return sum(rows * columns + rank * (rows + columns) for rows, columns in shapes)",
        "rank times the whole matrix": "return sum(rank * rows * columns for rows, columns in shapes)",
        "the entries of A times those of B": "return sum(rank * rows * rank * columns for rows, columns in shapes)",
        "the count for rank 1": "return sum(rows + columns for rows, columns in shapes)",
        "the rank is counted twice": "return sum(rank**2 * (rows + columns) for rows, columns in shapes)",
        "counted as long as `out`": "return sum(2 * rank * rows for rows, columns in shapes)",
        "counted as long as `in`": "return sum(2 * rank * columns for rows, columns in shapes)",
        "LoRA adds no bias": "return sum(rank * (rows + columns) + rows for rows, columns in shapes)",
        "nothing of size r x r": "return sum(rank * (rows + rank + columns) for rows, columns in shapes)",
        "a shape that occurs several times": "return sum(rank * (rows + columns) for rows, columns in set(shapes))",
        "only the first matrix": """
            for rows, columns in shapes:
                return rank * (rows + columns)
            return 0""",
        "only the last matrix": """
            count = 0
            for rows, columns in shapes:
                count = rank * (rows + columns)
            return count""",
        "where nothing is adapted": "return sum(rank * (rows + columns) for rows, columns in shapes) or 1",
        "A has r x in weights": "return sum(min(rank, rows, columns) * (rows + columns) for rows, columns in shapes)",
    },
    "E2.3": {
        "is not scaled": "return x @ weight.T + x @ a.T @ b.T",
        "but not divided by r": "return x @ weight.T + alpha * x @ a.T @ b.T",
        "but not multiplied by alpha": "return x @ weight.T + x @ a.T @ b.T / len(a)",
        "is multiplied by r, expected divided": "return x @ weight.T + alpha * len(a) * (x @ a.T @ b.T)",
        "upside down": "return x @ weight.T + len(a) / alpha * (x @ a.T @ b.T)",
        "scaled twice": "scale = alpha / len(a); return x @ weight.T + (scale * x @ a.T) @ (scale * b.T)",
        "the square root of r": "return x @ weight.T + alpha / math.sqrt(len(a)) * (x @ a.T @ b.T)",
        "the wrong sign": "return x @ weight.T - alpha / len(a) * (x @ a.T @ b.T)",
        "you divide by out, 5": "return x @ weight.T + alpha / len(b) * (x @ a.T @ b.T)",
        "you divide by in, 4": "return x @ weight.T + alpha / a.shape[1] * (x @ a.T @ b.T)",
        "you divide by N, 3": "return x @ weight.T + alpha / len(x) * (x @ a.T @ b.T)",
        "0.25 times what it should be": "return x @ weight.T + alpha / a.numel() * (x @ a.T @ b.T)",
        "x W^T alone": "return x @ weight.T",
        "the update alone": "return alpha / len(a) * (x @ a.T @ b.T)",
        "you scale the frozen layer, too": "return alpha / len(a) * (x @ weight.T + x @ a.T @ b.T)",
        "multiply base and update": "return (x @ weight.T) * (alpha / len(a) * (x @ a.T @ b.T))",
        "the merged weight": "return weight + alpha / len(a) * b @ a",
        "your result is 5 x 3, expected 3 x 5": "return (x @ weight.T + alpha / len(a) * (x @ a.T @ b.T)).T",
        "RuntimeError": "return x @ weight.T + alpha / len(a) * (x @ b.T @ a.T)",
        "changes its argument `weight`": "weight += alpha / len(a) * b @ a; return x @ weight.T",
    },
    "E2.4": {
        "in the wrong order": "s = alpha / len(a); return s * upstream.T @ (x @ a.T), s * (upstream @ b).T @ x",
        "gradient of a is transposed": "s = alpha / len(a); return s * x.T @ (upstream @ b), s * upstream.T @ (x @ a.T)",
        "gradient of b is transposed": "s = alpha / len(a); return s * (upstream @ b).T @ x, s * (x @ a.T).T @ upstream",
        "gradient of a is not scaled": "return (upstream @ b).T @ x, upstream.T @ (x @ a.T)",
        "gradient of b is not scaled": "return alpha / len(a) * (upstream @ b).T @ x, upstream.T @ (x @ a.T)",
        "gradient of a is multiplied by alpha, but": "return alpha * (upstream @ b).T @ x, alpha * upstream.T @ (x @ a.T)",
        "a mean over the 4 rows": """
            s = alpha / len(a) / len(x)
            return s * (upstream @ b).T @ x, s * upstream.T @ (x @ a.T)""",
        "you add up the rows before you multiply": """
            s, up = alpha / len(a), upstream.sum(0)
            return s * torch.outer(up @ b, x.sum(0)), s * torch.outer(up, (x @ a.T).sum(0))""",
        "gradient of a is zero": "return torch.zeros_like(a), alpha / len(a) * upstream.T @ (x @ a.T)",
        "gradient of b is zero": "return alpha / len(a) * (upstream @ b).T @ x, torch.zeros_like(b)",
        "gradient of a has the wrong sign": "s = -alpha / len(a); return s * (upstream @ b).T @ x, s * upstream.T @ (x @ a.T)",
        "gradient of a is 5 x 3, expected 2 x 3": "s = alpha / len(a); return s * upstream.T @ x, s * upstream.T @ (x @ a.T)",
        "gradient of a is 4 x 2 x 3": """
            s = alpha / len(a)
            return s * (upstream @ b)[:, :, None] * x[:, None], s * upstream[:, :, None] * (x @ a.T)[:, None]""",
        "expected two gradients": "s = alpha / len(a); return s * upstream.T @ x",
        "gradient of a is scaled twice": """
            s = alpha / len(a)
            return s * (upstream @ (s * b)).T @ x, s * upstream.T @ (x @ a.T)""",
        "RuntimeError": """
            y = alpha / len(a) * x @ a.T @ b.T
            y.backward(upstream)
            return a.grad, b.grad""",
    },
    "E2.5": {
        "more than the budget: round down": "return math.ceil(budget / sum(sum(shape) for shape in shapes))",
        "you count the A's alone": "return min(budget // sum(columns for _, columns in shapes), min(map(min, shapes)))",
        "you count the B's alone": "return min(budget // sum(rows for rows, _ in shapes), min(map(min, shapes)))",
        "divide by what rank 1 trains": "return budget // sum(rows * columns for rows, columns in shapes)",
        "you count the first matrix alone": "return min(budget // sum(shapes[0]), min(map(min, shapes)))",
        "you count the last matrix alone": "return min(budget // sum(shapes[-1]), min(map(min, shapes)))",
        "rank 53 is above the smallest side of all matrices, 4": "return budget // sum(sum(shape) for shape in shapes)",
        "rank 30 is above the smallest side": "return min(budget // sum(sum(shape) for shape in shapes), min(shapes[0]))",
        "B A has no higher rank than that": "return min(budget // sum(sum(shape) for shape in shapes), min(map(max, shapes)))",
        "trains exactly 1,050, and that is allowed": """
            return min((budget - 1) // sum(sum(shape) for shape in shapes), min(map(min, shapes)))""",
        "need not be a power of two": """
            rank = min(budget // sum(sum(shape) for shape in shapes), min(map(min, shapes)))
            return 2 ** (rank.bit_length() - 1) if rank else 0""",
        "a rank is a whole number": "return min(budget / sum(sum(shape) for shape in shapes), min(map(min, shapes)))",
        "not even rank 1 fits": "return max(1, min(budget // sum(sum(shape) for shape in shapes), min(map(min, shapes))))",
        "never below 0": "return min(budget // sum(sum(shape) for shape in shapes), min(map(min, shapes))) or -1",
        "take the largest rank that fits": """
            rank = min(budget // sum(sum(shape) for shape in shapes), min(map(min, shapes)))
            return rank - 1 if rank == min(map(min, shapes)) else rank""",
    },
    "E2.6": {
        "changes its argument `weight`": "weight += alpha / len(a) * b @ a; return weight",
        "is not scaled": "return weight + b @ a",
        "but not divided by r": "return weight + alpha * b @ a",
        "is multiplied by r, expected divided": "return weight + alpha * len(a) * b @ a",
        "upside down": "return weight + len(a) / alpha * b @ a",
        "the old weight": "weight.clone().add_(b @ a, alpha=alpha / len(a)); return weight.clone()",
        "the update alone": "return alpha / len(a) * b @ a",
        "you scale the frozen weight, too": "return alpha / len(a) * (weight + b @ a)",
        "you mix weight and update": "return torch.lerp(weight, b @ a, alpha / len(a))",
        "the wrong sign": "return weight - alpha / len(a) * b @ a",
        "you divide by out, 3": "return weight + alpha / len(b) * b @ a",
        "you divide by in, 4": "return weight + alpha / a.shape[1] * b @ a",
        "scaled twice": "return weight + (alpha / len(a) * b) @ (alpha / len(a) * a)",
        "your result is 4 x 3, expected 3 x 4": "return (weight + alpha / len(a) * b @ a).T",
        "RuntimeError": "return weight + alpha / len(a) * a.T @ b.T",
        "None, expected a list": "weight.clone().add_(b @ a, alpha=alpha / len(a))",
    },
    "E2.7": {
        "you blend the A's and the B's apart": """
            a = sum(share * a for (a, _, _), share in zip(adapters, shares))
            b = sum(share * b for (_, b, _), share in zip(adapters, shares))
            return weight + adapters[0][2] / len(a) * b @ a""",
        "cross terms": """
            a = sum(a for a, _, _ in adapters) / len(adapters)
            b = sum(b for _, b, _ in adapters) / len(adapters)
            return weight + adapters[0][2] / len(a) * b @ a""",
        "laid side by side": """
            a, b = torch.cat([a for a, _, _ in adapters]), torch.cat([b for _, b, _ in adapters], 1)
            return weight + b @ a""",
        "or by the sum of all ranks": """
            a = torch.cat([share * a for (a, _, _), share in zip(adapters, shares)])
            b = torch.cat([b for _, b, _ in adapters], 1)
            return weight + adapters[0][2] / len(a) * b @ a""",
        "your shares are squared": """
            a = torch.cat([share * a for (a, _, _), share in zip(adapters, shares)])
            b = torch.cat([share * alpha / len(a) * b for (a, b, alpha), share in zip(adapters, shares)], 1)
            return weight + b @ a""",
        "your shares are missing": "return weight + sum(alpha / len(a) * b @ a for a, b, alpha in adapters)",
        "your updates are not scaled": "return weight + sum(share * b @ a for (a, b, _), share in zip(adapters, shares))",
        "alpha is not divided by r": """
            return weight + sum(share * alpha * b @ a for (a, b, alpha), share in zip(adapters, shares))""",
        "you blend merged weights": """
            return sum(share * (weight + alpha / len(a) * b @ a) for (a, b, alpha), share in zip(adapters, shares))""",
        "`weight` is added 2 times": """
            return sum(weight + share * alpha / len(a) * b @ a for (a, b, alpha), share in zip(adapters, shares))""",
        "you divide by the sum of the shares": """
            parts = [share * alpha / len(a) * b @ a for (a, b, alpha), share in zip(adapters, shares)]
            return weight + sum(parts) / sum(shares)""",
        "you divide by the number of adapters": """
            parts = [share * alpha / len(a) * b @ a for (a, b, alpha), share in zip(adapters, shares)]
            return weight + sum(parts) / len(parts)""",
        "the scale of the first adapter": """
            scale = adapters[0][2] / len(adapters[0][0])
            return weight + sum(share * scale * b @ a for (a, b, _), share in zip(adapters, shares))""",
        "the scale of the last adapter": """
            for a, b, alpha in adapters:
                scale = alpha / len(a)
            return weight + sum(share * scale * b @ a for (a, b, _), share in zip(adapters, shares))""",
        "the updates alone": """
            return sum(share * alpha / len(a) * b @ a for (a, b, alpha), share in zip(adapters, shares))""",
        "only the first adapter": """
            for (a, b, alpha), share in zip(adapters, shares):
                return weight + share * alpha / len(a) * b @ a
            return weight""",
        "only the last adapter": """
            blended = weight
            for (a, b, alpha), share in zip(adapters, shares):
                blended = weight + share * alpha / len(a) * b @ a
            return blended""",
        "the old weight": """
            for (a, b, alpha), share in zip(adapters, shares):
                weight + share * alpha / len(a) * b @ a
            return weight""",
        "changes its argument `weight`": """
            blended = weight
            for (a, b, alpha), share in zip(adapters, shares):
                blended += share * alpha / len(a) * b @ a
            return blended""",
        "RuntimeError": """
            parts = [(share * alpha / len(a) * b, a) for (a, b, alpha), share in zip(adapters, shares)]
            b, a = (torch.stack(part) for part in zip(*parts))
            return weight + (b @ a).sum(0)""",
        "without adapters": """
            blended = weight if adapters else torch.zeros_like(weight)
            for (a, b, alpha), share in zip(adapters, shares):
                blended = blended + share * alpha / len(a) * b @ a
            return blended""",
    },
    "E2.8": {
        "every row gets the updates of all jobs": """
            return x @ weight.T + sum(alpha / len(a) * (x @ a.T @ b.T) for a, b, alpha in adapters)""",
        "row 1 belongs to job 1 and gets the update of job 0": """
            a, b, alpha = adapters[0]
            return x @ weight.T + alpha / len(a) * (x @ a.T @ b.T)""",
        "sorted by job": """
            rows = []
            for i, (a, b, alpha) in enumerate(adapters):
                own = x[torch.tensor(job) == i]
                rows.append(own @ weight.T + alpha / len(a) * (own @ a.T @ b.T))
            return torch.cat(rows)""",
        "row 1 belongs to job 1 and gets": """
            parts = torch.arange(len(x)).chunk(len(adapters))  # as if the rows came sorted
            y = x @ weight.T
            for rows, (a, b, alpha) in zip(parts, adapters):
                y[rows] += alpha / len(a) * (x[rows] @ a.T @ b.T)
            return y""",
        "row 0 belongs to job 2 and gets the update of job 1": """
            y = x @ weight.T
            for own, (a, b, alpha) in zip(sorted(set(job)), adapters):  # slips where a job has no row
                rows = torch.tensor(job) == own
                y[rows] += alpha / len(a) * (x[rows] @ a.T @ b.T)
            return y""",
        "x W^T is added 2 times": """
            y = torch.zeros(len(x), len(weight))
            for i, (a, b, alpha) in enumerate(adapters):
                mine = (torch.tensor(job) == i).float()[:, None]
                y += x @ weight.T + mine * (alpha / len(a) * (x @ a.T @ b.T))
            return y""",
        "the updates are missing": """
            y = x @ weight.T
            for i, (a, b, alpha) in enumerate(adapters):
                rows = torch.tensor(job) == i
                y[rows].add_(alpha / len(a) * (x[rows] @ a.T @ b.T))  # y[rows] is a copy
            return y""",
        "the updates alone": """
            y = torch.zeros(len(x), len(weight))
            for i, (a, b, alpha) in enumerate(adapters):
                rows = torch.tensor(job) == i
                y[rows] = alpha / len(a) * (x[rows] @ a.T @ b.T)
            return y""",
        "update of row 0, job 0, is not scaled": """
            y = x @ weight.T
            for i, (a, b, alpha) in enumerate(adapters):
                rows = torch.tensor(job) == i
                y[rows] += x[rows] @ a.T @ b.T
            return y""",
        "but not divided by r": """
            y = x @ weight.T
            for i, (a, b, alpha) in enumerate(adapters):
                rows = torch.tensor(job) == i
                y[rows] += alpha * x[rows] @ a.T @ b.T
            return y""",
        "1.5 times what it should be": """
            y, scale = x @ weight.T, adapters[0][2] / len(adapters[0][0])
            for i, (a, b, alpha) in enumerate(adapters):
                rows = torch.tensor(job) == i
                y[rows] += scale * (x[rows] @ a.T @ b.T)
            return y""",
        "row 1 gets no update": """
            y = x @ weight.T
            a, b, alpha = adapters[0]
            rows = torch.tensor(job) == 0
            y[rows] += alpha / len(a) * (x[rows] @ a.T @ b.T)
            return y""",
        "row 2 gets no update": """
            y = x @ weight.T
            for i, (a, b, alpha) in enumerate(adapters):
                if i in job:
                    row = job.index(i)
                    y[row] += alpha / len(a) * (x[row] @ a.T @ b.T)
            return y""",
        "RuntimeError": """
            a, b = torch.stack([adapters[i][0] for i in job]), torch.stack([adapters[i][1] for i in job])
            scale = torch.tensor([adapters[i][2] / len(adapters[i][0]) for i in job])
            return x @ weight.T + scale[:, None] * torch.einsum("ni,nri,nor->no", x, a, b)""",
        "your result is 2 x 4, expected 4 x 2": """
            y = x @ weight.T
            for i, (a, b, alpha) in enumerate(adapters):
                rows = torch.tensor(job) == i
                y[rows] += alpha / len(a) * (x[rows] @ a.T @ b.T)
            return y.T""",
    },
}
LCS = """
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    LCS = table[-1][-1]
"""


def test_every_exercise_has_at_least_five_wrong_answers():
    assert {name: len(wrong) >= 5 for name, wrong in WRONG.items()} == dict.fromkeys(EXERCISES, True)


@pytest.mark.parametrize(("name", "symptom"), [(name, symptom) for name, wrong in WRONG.items() for symptom in wrong])
def test_a_wrong_answer_is_named_by_its_symptom(name, symptom, names):
    body = WRONG[name][symptom]
    indent = "" if body.startswith("\n") else "\n            "
    lines = [line[8:] for line in (indent + body).splitlines()[1:]]
    source = "\n".join([EXERCISES[name].stub.splitlines()[0], *(LCS.splitlines() if "LCS" in body else []), *lines])
    message = run(name, function_of(source, name, names)).message
    assert symptom in message.splitlines()[0], message


# Mutants that compute the same as the solution, by their name (line in the solution, what became what), and why.
COMMUTES = "numbers may be added in any order"
EQUIVALENT = {name: {} for name in EXERCISES} | {
    "E1.1": {
        "3: i + n -> n + i": COMMUTES,
        "3: i + n -> n + i (again)": COMMUTES,
    },
    "E1.2": {
        "2: len(second) + 1 -> 1 + len(second)": COMMUTES,
        "6: above[j] + 1 -> 1 + above[j]": COMMUTES,
        "6: j + 1 -> 1 + j": COMMUTES,
        "7: len(first) + len(second) -> len(second) + len(first)": COMMUTES,
        "6: max(row[j], above[j + 1]) -> max(above[j + 1], row[j])": "the larger of two numbers, in any order",
        "7: max(1, len(first) + len(second)) -> max(len(first) + len(second), 1)": "the larger of two numbers, in any order",
        "2: 1 -> 2": "one more zero in a row of zeros: read only if `first` is empty, and as 0",
        "7: 1 -> 2": "differs only where one word is compared with none, and then 0 is divided",
    },
    "E1.6": {"5: sum(row) + length -> length + sum(row)": COMMUTES},
    "E1.9": {
        "4: weights_and_gradients + moments -> moments + weights_and_gradients": COMMUTES,
        "4: weights_and_gradients + moments + (4 if master_copy else 0) -> "
        "(4 if master_copy else 0) + (weights_and_gradients + moments)": COMMUTES,
    },
    "E2.2": {"2: rows + columns -> columns + rows": COMMUTES},
    "E2.3": {"3: x @ weight.T + scale * (x @ a.T @ b.T) -> scale * (x @ a.T @ b.T) + x @ weight.T": COMMUTES},
    "E2.6": {"2: weight + alpha / len(a) * b @ a -> alpha / len(a) * b @ a + weight": COMMUTES},
    "E2.5": {
        "2: rows + columns -> columns + rows": COMMUTES,
        "3: min(budget // rank_one, min((min(shape) for shape in shapes))) -> "
        "min(min((min(shape) for shape in shapes)), budget // rank_one)": "the smaller of two numbers, in any order",
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
OTHER_NAMES = {"all": "any", "any": "all", "max": "min", "min": "max", "sum": "len", "mean": "sum", "exp": "log"}


def replacements(node):
    """What may stand in place of a node, one change each."""
    if isinstance(node, ast.BinOp | ast.BoolOp):
        for operator in SWAPS.get(type(node.op), []):
            yield changed(node, op=operator())
    if isinstance(node, ast.BinOp):
        yield from (node.left, node.right)  # a dropped term
        if not isinstance(node.op, ast.Mult):
            yield changed(node, left=node.right, right=node.left)
    if isinstance(node, ast.Compare):
        for operator in SWAPS.get(type(node.ops[0]), []):
            yield changed(node, ops=[operator()])
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield from (ast.Constant(node.value + 1), ast.Constant(node.value - 1), ast.Constant(node.value * 2))
    if isinstance(node, ast.UnaryOp):
        yield node.operand
    if isinstance(node, ast.Slice):
        yield ast.Slice(node.upper, node.lower)  # [:-1] becomes [-1:]
        yield ast.Slice(None, None)
        yield ast.Slice(node.lower, node.upper, ast.UnaryOp(ast.USub(), ast.Constant(1)))
    if isinstance(node, ast.Call):
        if len(node.args) > 1:
            yield changed(node, args=[node.args[1], node.args[0], *node.args[2:]])
        if node.keywords:
            yield changed(node, keywords=[])
        if isinstance(node.func, ast.Name) and node.func.id in OTHER_NAMES:
            yield changed(node, func=ast.Name(OTHER_NAMES[node.func.id], ast.Load()))
        if isinstance(node.func, ast.Attribute):
            yield node.func.value  # a method that is not called
            if node.func.attr in OTHER_NAMES:
                yield changed(node, func=changed(node.func, attr=OTHER_NAMES[node.func.attr]))
    if isinstance(node, ast.Attribute) and node.attr == "T":
        yield node.value  # a matrix that is not transposed
    if isinstance(node, ast.IfExp):
        yield changed(node, body=node.orelse, orelse=node.body)
        yield from (node.body, node.orelse)
    if isinstance(node, ast.Tuple | ast.List) and len(node.elts) > 1 and isinstance(node.ctx, ast.Load):
        yield changed(node, elts=node.elts[::-1])
    if isinstance(node, ast.comprehension) and node.ifs:
        yield changed(node, ifs=[])
    if isinstance(node, ast.Assign | ast.Expr | ast.Break | ast.Return) or (isinstance(node, ast.For) and node.orelse):
        yield ast.Pass()
    if isinstance(node, ast.For) and node.orelse:
        yield changed(node, orelse=[])


def changed(node, **fields):
    new = copy.copy(node)
    for field, value in fields.items():
        setattr(new, field, value)
    return new


def text_of(node):
    try:
        return ast.unparse(ast.fix_missing_locations(node)).splitlines()[0].strip() or "nothing"
    except AttributeError:  # ast.unparse does not take a slice alone
        return ast.unparse(ast.Subscript(ast.Name("x", ast.Load()), node, ast.Load()))


def mutants_of(source):
    """Name -> syntax tree of every mutant that differs from the source."""
    found = {}
    tree = ast.parse(source)
    for place, node in enumerate(ast.walk(tree)):
        for new in replacements(node):
            mutant = copy.deepcopy(tree)
            old = list(ast.walk(mutant))[place]
            _Replace(old, copy.deepcopy(new)).visit(mutant)
            mutated = ast.unparse(ast.fix_missing_locations(mutant))
            line = getattr(node, "lineno", None) or node.target.lineno
            name = f"{line}: {text_of(node)} -> {text_of(new)}"
            if mutated != ast.unparse(tree) and mutated not in found.values():
                while name in found:  # the same change in another place of the line
                    name += " (again)"
                found[name] = mutated
    return found


class _Replace(ast.NodeTransformer):
    def __init__(self, old, new):
        self.old, self.new = old, new

    def visit(self, node):
        return self.new if node is self.old else self.generic_visit(node)


def survivors_of(name, names):
    mutants = mutants_of(EXERCISES[name].solution)
    survivors = []
    for mutant, source in mutants.items():
        verdict = run(name, function_of(source, name, names))
        if verdict.passed:
            survivors.append(mutant)
    return mutants, survivors


@pytest.mark.parametrize("name", EXERCISES)
def test_mutants_of_the_solution_are_refused(name, names, monkeypatch, record_property):
    monkeypatch.setattr(checks, "SECONDS", 2.0)  # for mutants that never end
    mutants, survivors = survivors_of(name, names)
    equivalent = EQUIVALENT[name]
    assert set(equivalent) <= set(survivors), "listed as equivalent, but refused or not made"
    killed, total = len(mutants) - len(survivors), len(mutants) - len(equivalent)
    record_property("refused", f"{killed} of {total}")
    assert total >= 5
    assert killed >= 0.95 * total, [mutant for mutant in survivors if mutant not in equivalent]


@pytest.mark.parametrize("path", DAYS, ids=lambda path: path.stem)
def test_each_quiz_question_has_one_right_answer_and_explains_all_four(path):
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    questions = [source for source in sources if source.startswith("**Question ")]
    assert [re.match(r"\*\*Question (\d)\.\*\*", source)[1] for source in questions] == list("12345")
    right = []
    for source in questions:
        asked, folded = source.split("<details><summary>Answer</summary>\n\n")
        right += re.findall(r"\*\*Right: ([a-d])\*\*", source)
        explained = dict(re.findall(r"^- \*\*([a-d])\)\*\* (Right|Wrong)\. ", folded, re.M))
        assert re.findall(r"^- \*\*([a-d])\)\*\* ", asked, re.M) == list("abcd")
        assert explained == {letter: "Right" if letter == right[-1] else "Wrong" for letter in "abcd"}
        assert folded.endswith("</details>")
        assert "Right" not in asked
    assert len(right) == 5
    assert len(set(right)) >= 3, "the right answer stands at the same place too often"
