"""What may not stand in the tree: code that runs data, secrets, names of a machine, and
installations that anybody could redirect.

ruff's port of bandit knows Python's own traps. The rules here add the traps of model files, and
look into notebooks and into files that are not Python. Each rule is tried on a planted snippet, so
that none of them can be empty.
"""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import yaml
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).parents[1]
# safetensors hold numbers alone; the course reads no other format of weights
BINARY = {".png", ".safetensors"}
NOT_OURS = {
    ".git",
    ".venv",
    "node_modules",
    "build",
    "dist",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",
}

# Places where a rule does not hold, with the reason. One that is no longer needed fails.
ALLOWED = {
    (
        "S102",
        "tests/test_exercises.py",
    ): "runs the notebooks' own cells and the solutions in them, on purpose",
    (
        "S301",
        "tests/conftest.py",
    ): "proves that its malicious pickle would work if something did load it",
    ("S314", "tools/figures/drawing.py"): "reads a table out of the committed notebook",
    ("plain http", "LICENSE"): "the text of the Apache licence",
    ("plain http", "tests/test_notebooks.py"): "an address that the test sees blocked",
    (
        "unpinned install",
        "docs/faults.md",
    ): "messages to a reader, in which pip install stands with a range where one matters",
    ("remote code", "tests/test_security.py"): "the rule itself",
}

RUFF_RULES = "S"
# Asserts, random numbers without a secret, subprocesses given as lists, swallowed exceptions, and
# guesses at passwords by a variable's name: in a course no risk.
RUFF_IGNORED = "S101,S311,S603,S607,S110,S112,S105,S106,S107"

TEXT_RULES = {
    "secret": re.compile(
        r"\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bAKIA[0-9A-Z]{16}\b|\bsk-[\w-]{20,}"
        r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
        r"|\bAuthorization\b[\"']?\s*[:=,]\s*[\"']?(?:Bearer|Basic|token)\s+[\w+/=.-]{8,}"
    ),
    "machine path": re.compile(
        r"(?<![\w.}])(?:/(?:home|root|tmp|Users)/[\w.]|[A-Za-z]:\\+Users\b)"
    ),
    "plain http": re.compile(r"http://(?!127\.0\.0\.1|localhost\b)\w"),
    "downloaded script": re.compile(
        r"\bwget\s+(?:-|http)|\bcurl\s+(?:-|http)|\|\s*(?:sudo\s+)?(?:ba|z|da)?sh\b"
    ),
    "other index": re.compile(
        r"index-url[= \"',]+(?!https://download\.pytorch\.org/|\$\(TORCH_INDEX\))\S"
    ),
    # in a config.json: what trust_remote_code would run
    "model with code": re.compile(r'"auto_map"\s*:'),
    "unpinned action": re.compile(r"\buses:\s*(?!\./)[\w./-]+@(?![0-9a-f]{40}\b)"),
}
# of SVG, never fetched
NAMESPACES = re.compile(r"http://(?:www\.w3\.org|purl\.org/dc|creativecommons\.org/ns)[\w./#-]*")
# kinds of files whose `pip install` is run, not shown in an error message
INSTALLS = {".ipynb", ".md", ".yml", ".sh", ""}
UNPICKLERS = {
    f"{module}.{name}"
    for module in ("joblib", "cloudpickle", "cPickle")
    for name in ("load", "loads")
}
SHELLS = {"subprocess.getoutput", "subprocess.getstatusoutput"}
CODE_RULES = {"remote code", "pickled weights", "pickled arrays", "unpickler", "shell"}


def our_files() -> list[Path]:
    """What git tracks or would track; outside a checkout, all files that are not built or
    installed.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\0")
        paths = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        paths = [path for path in ROOT.rglob("*") if not NOT_OURS & {*path.relative_to(ROOT).parts}]
    return sorted(path for path in paths if path.is_file())


def found_in(name: str, content: str) -> Iterator[tuple[str, str]]:
    """The broken rules of a file, each with the words that break it."""
    suffix = Path(name).suffix
    code, text = "", content
    if suffix == ".py":
        code = content
    elif suffix == ".ipynb":
        code, text = parts_of_notebook(content)
    elif suffix == ".svg":
        text = NAMESPACES.sub("", content)
    for line in text.splitlines():
        yield from (
            (rule, line.strip()[:200])
            for rule, pattern in TEXT_RULES.items()
            if pattern.search(line)
        )
    if code:
        tree = ast.parse(code)
        yield from found_in_code(tree)
    if suffix in INSTALLS:
        commands = [match[1] for match in re.finditer(r"\bpip3? install ([^\n`#;&|)]*)", text)]
        arguments = [re.sub(r"[\"'\\]", " ", command).split() for command in commands]
        arguments += lists_of_pip(tree) if code else []
        yield from (("unpinned install", word) for words in arguments for word in unpinned(words))


def parts_of_notebook(content: str) -> tuple[str, str]:
    """Code with magics as calls, and all that is text: sources, outputs but pictures, metadata."""
    notebook = nbformat.reads(content, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code = "\n".join(TransformerManager().transform_cell(cell.source) for cell in cells)
    for cell in cells:
        for output in cell.outputs:
            for kind in [
                kind
                for kind in output.get("data", {})
                if kind.startswith("image/") and kind != "image/svg+xml"
            ]:
                del output.data[kind]
    sources = "\n".join(cell.source for cell in notebook.cells)
    rest = [
        notebook.metadata,
        *([cell.metadata, cell.get("outputs", [])] for cell in notebook.cells),
    ]
    return code, sources + "\n" + "\n".join(strings_in(rest))


def strings_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)


def found_in_code(tree: ast.AST) -> Iterator[tuple[str, str]]:
    names = imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            yield "remote code", "a key or name as a string"
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        first, dot, rest = function.partition(".")
        function = names.get(first, first) + dot + rest
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if options.get("trust_remote_code", "False") != "False":
            yield "remote code", f"{function}(trust_remote_code=...)"
        if options.get("weights_only", "True" if function != "torch.load" else "absent") != "True":
            yield "pickled weights", f"{function} without weights_only=True"
        if options.get("allow_pickle", "False") != "False":
            yield "pickled arrays", f"{function}(allow_pickle=...)"
        if function in UNPICKLERS:
            yield "unpickler", function
        if function in SHELLS or options.get("shell", "False") != "False":
            yield "shell", function


def imported_names(tree: ast.AST) -> dict[str, str]:
    """What a name of this file stands for: {"np": "numpy", "load": "torch.load"}."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
    return names


def lists_of_pip(tree: ast.AST) -> Iterator[list[str]]:
    """The words after "pip", "install" in lists given to subprocess; {...} in an f-string stays as
    it is written.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.List):
            words = [
                str(ast.literal_eval(word)) if isinstance(word, ast.Constant) else ast.unparse(word)
                for word in node.elts
            ]
            if "pip" in words and "install" in words:
                yield words[words.index("install") + 1 :]


def unpinned(words: list[str]) -> list[str]:
    """The packages without a version, a range or an address with a revision.

    Those that constraints or a folder pin are pinned.
    """
    if {"-c", "-e", "-r"} & {*words}:
        return []
    return [
        word
        for word in words
        if re.match(r"[A-Za-z]", word) and not re.search(r"[<>=~]=?\s*\d|@", word)
    ]


def ruff(*paths: Path) -> list[dict]:
    options = [
        "--isolated",
        "--no-cache",
        "--output-format",
        "json",
        "--select",
        RUFF_RULES,
        "--ignore",
        RUFF_IGNORED,
    ]
    command = [sys.executable, "-m", "ruff", "check", *options, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def findings() -> list[tuple[str, str, str]]:
    """(rule, file, words) over the whole tree."""
    files = our_files()
    found = []
    for path in files:
        if path.suffix not in BINARY:
            name = path.relative_to(ROOT).as_posix()
            found += [
                (rule, name, words)
                for rule, words in found_in(name, path.read_text(encoding="utf-8"))
            ]
    code = ruff(*(path for path in files if path.suffix in {".py", ".ipynb"}))
    return found + [
        (item["code"], Path(item["filename"]).relative_to(ROOT).as_posix(), item["message"])
        for item in code
    ]


def test_the_tree_breaks_no_rule(findings):
    assert [
        (rule, name, words) for rule, name, words in findings if (rule, name) not in ALLOWED
    ] == []


def test_every_allowed_place_is_still_needed(findings):
    needed = {(rule, name) for rule, name, _ in findings}
    assert [place for place in ALLOWED if place not in needed and (ROOT / place[1]).exists()] == []


def test_the_whole_tree_is_read():
    names = {path.relative_to(ROOT).as_posix() for path in our_files()}
    assert {
        "README.md",
        "Makefile",
        ".github/workflows/test.yml",
        "notebooks/day1_alpaca.ipynb",
        "course_lib/models.py",
    } <= names
    assert not [name for name in names if NOT_OURS & {*name.split("/")}]


def test_outside_git_the_same_files_are_read(monkeypatch):
    inside = our_files()
    monkeypatch.setenv("PATH", os.devnull)
    assert {path for path in inside if path.suffix in {".py", ".md", ".ipynb"}} <= {*our_files()}
    assert not [path for path in our_files() if NOT_OURS & {*path.relative_to(ROOT).parts}]


def notebook(source="", output="", markdown="", data=None):
    cell = nbformat.v4.new_code_cell(
        source, outputs=[nbformat.v4.new_output("stream", text=output)]
    )
    if data:
        cell.outputs.append(nbformat.v4.new_output("display_data", data=data))
    return nbformat.writes(
        nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_markdown_cell(markdown)])
    )


# where a secret would stand; the planted strings are put together here, so that this file itself
# breaks no rule
ANY = "x" * 24
PLANTED = [
    ("secret", "a.md", "token: hf" + f"_{ANY}"),
    ("secret", "a.ipynb", notebook("login('hf" + f"_{ANY}')")),
    ("secret", "a.ipynb", notebook(output="logged in with ghp" + f"_{ANY}")),
    ("secret", "a.yml", "token: github" + f"_pat_{ANY}"),
    ("secret", "a.py", "KEY = 'AKIA" + "ABCDEFGHIJKLMNOP'"),
    ("secret", "a.toml", "key = 'sk" + f"-{ANY}'"),
    ("secret", "a.txt", "-----BEGIN RSA PRIVATE" + " KEY-----"),
    ("secret", "a.py", "headers = {'Authorization': 'Bearer" + f" {ANY}'}}"),
    ("secret", "a.md", "Authorization: Basic" + f" {ANY}"),
    ("machine path", "a.md", "it lies in /home" + "/ann/models"),
    ("machine path", "a.ipynb", notebook(output="saved to /tmp" + "/run/model")),
    ("machine path", "a.ipynb", notebook(data={"text/html": "<td>/root" + "/.cache</td>"})),
    ("machine path", "a.json", '{"folder": "/Users' + '/ann"}'),
    ("machine path", "a.svg", "<text>C:" + "\\Users\\ann</text>"),
    ("plain http", "a.md", "[paper](http:" + "//arxiv.org/abs/1)"),
    ("plain http", "a.svg", '<image href="http:' + '//example.org/a.png"/>'),
    ("downloaded script", "a.md", "curl" + " -sSf https://example.org/install |" + " sh"),
    ("downloaded script", "a.ipynb", notebook("!wget" + " https://example.org/data.json")),
    ("downloaded script", "Makefile", "run:\n\t@python make.py |" + " bash"),
    (
        "other index",
        "a.md",
        "pip install -c constraints.txt --extra-index" + "-url https://example.org/simple torch",
    ),
    (
        "other index",
        "a.ipynb",
        notebook(
            '["pip", "install", "--index' + '-url", "https://example.org/simple", "torch>=2"]'
        ),
    ),
    ("model with code", "config.json", '{"auto' + '_map": {"AutoModel": "modeling.Model"}}'),
    ("unpinned action", "test.yml", "- uses: " + "actions/checkout@v4"),
    ("unpinned install", "a.ipynb", notebook("!pip install peft")),
    ("unpinned install", "a.ipynb", notebook("%pip install -q 'peft>=0.20' bitsandbytes")),
    (
        "unpinned install",
        "a.ipynb",
        notebook('run([sys.executable, "-m", "pip", "install", "-q", "peft"])'),
    ),
    ("unpinned install", "a.md", "    python -m pip install peft"),
    ("unpinned install", "Makefile", "run:\n\tpip install --quiet 'peft[x]'"),
    ("remote code", "a.py", "AutoModel.from_pretrained(name, trust_remote_code=True)"),
    ("remote code", "a.ipynb", notebook("load(name, trust_remote_code=flag)")),
    ("remote code", "a.py", "options = {'trust_remote_code': True}"),
    ("pickled weights", "a.py", "import torch\ntorch.load(path)"),
    ("pickled weights", "a.py", "from torch import load as read\nread(path)"),
    ("pickled weights", "a.py", "torch.load(path, weights_only=False)"),
    ("pickled weights", "a.ipynb", notebook("state = read(path, weights_only=False)")),
    ("pickled arrays", "a.py", "import numpy as np\nnp.load(path, allow_pickle=True)"),
    ("unpickler", "a.py", "import joblib\njoblib.load(path)"),
    ("unpickler", "a.py", "from cloudpickle import loads\nloads(data)"),
    ("unpickler", "a.py", "import cPickle as p\np.load(file)"),
    ("shell", "a.py", "run(command, shell=True)"),
    ("shell", "a.py", "from subprocess import getoutput\ngetoutput(command)"),
]


@pytest.mark.parametrize(("rule", "name", "content"), PLANTED)
def test_a_planted_breach_is_found(rule, name, content):
    assert rule in {found for found, _ in found_in(name, content)}


def test_every_rule_has_a_planted_breach():
    assert {rule for rule, *_ in PLANTED} == TEXT_RULES.keys() | CODE_RULES | {"unpinned install"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "a.py",
            "AutoModel.from_pretrained(name, trust_remote_code=False)  # trust_remote_code=True "
            "runs the model's own code",
        ),
        ("a.py", "import torch\ntorch.load(path, weights_only=True)"),
        ("a.py", "headers = {'Authorization': f'Bearer {token}'}"),
        (
            "a.md",
            "Never set trust_remote_code, and keep hf_... tokens out of cells; a server on "
            "http://127.0.0.1:8000",
        ),
        (
            "a.md",
            "pip install -e '.[course]', or `pip install \"peft>=0.20\"` and `python -m pip "
            "install torch==2.13.0`",
        ),
        (
            "a.ipynb",
            notebook(
                'call([sys.executable, "-m", "pip", "install", "--no-deps", '
                'f"git+https://github.com/{REPO}@{REF}"])'
            ),
        ),
        (
            "a.ipynb",
            notebook(
                "%matplotlib inline\nfiles = !ls",
                markdown="see https://example.org/home/index.html",
            ),
        ),
        ("a.svg", '<svg xmlns="http:' + '//www.w3.org/2000/svg"/>'),
        ("a.yml", "- uses: " + "actions/checkout@" + "0a" * 20 + "  # v4"),
        ("Makefile", "a:\n\t$(PIP) --extra-index-url $(TORCH_INDEX) torch"),
    ],
)
def test_what_is_safe_passes(name, content):
    assert list(found_in(name, content)) == []


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ("S102", "exec(text)"),
        ("S307", "eval(text)"),
        ("S301", "import pickle as p\np.load(file)"),
        ("S301", "import dill\ndill.loads(data)"),
        ("S302", "import marshal\nmarshal.loads(data)"),
        ("S108", "folder = '/tmp" + "/run'"),
        ("S202", "import tarfile\ntarfile.open(path).extractall()"),
        ("S306", "import tempfile\ntempfile.mktemp()"),
        ("S501", "import httpx\nhttpx.get(address, verify=False)"),
        ("S506", "import yaml\nyaml.load(text)"),
        ("S602", "import subprocess\nsubprocess.run(command, shell=True)"),
        ("S605", "import os\nos.system(command)"),
    ],
)
@pytest.mark.parametrize("suffix", [".py", ".ipynb"])
def test_ruff_finds_the_traps_of_python_in_modules_and_cells(tmp_path, rule, code, suffix):
    path = tmp_path / f"planted{suffix}"
    path.write_text(notebook(code) if suffix == ".ipynb" else code)
    assert rule in {item["code"] for item in ruff(path)}


def breaches_of(workflow: dict) -> list[str]:
    """What a GitHub workflow may do beyond reading the repository."""
    found = (
        []
        if workflow.get("permissions") == {"contents": "read"}
        else ["permissions at the top must be contents: read"]
    )
    triggers = workflow.get("on", workflow.get(True))  # YAML 1.1 reads the key `on` as true
    found += (
        ["pull_request_target runs foreign code with our rights"]
        if "pull_request_target" in triggers
        else []
    )
    for name, job in workflow["jobs"].items():
        found += [f"{name}: permissions of its own"] if "permissions" in job else []
        for step in job["steps"]:
            text = step.get("run", "")
            found += [f"{name}: an expression inside a script"] if "${{" in text else []
            keeps_token = step.get("with", {}).get("persist-credentials") is not False
            found += (
                [f"{name}: checkout keeps its token"]
                if keeps_token and "actions/checkout@" in step.get("uses", "")
                else []
            )
    return found


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "workflows").glob("*.y*ml")), ids=lambda path: path.name
)
def test_a_workflow_has_the_least_rights(path):
    assert breaches_of(yaml.safe_load(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("change", "breach"),
    [
        ({"permissions": "write-all"}, "permissions at the top"),
        ({"on": ["pull_request_target"]}, "pull_request_target"),
        (
            {"jobs": {"a": {"steps": [], "permissions": {"contents": "write"}}}},
            "a: permissions of its own",
        ),
        (
            {"jobs": {"a": {"steps": [{"run": "echo ${{ github.head_ref }}"}]}}},
            "a: an expression inside a script",
        ),
        (
            {"jobs": {"a": {"steps": [{"uses": "actions/checkout@v4"}]}}},
            "a: checkout keeps its token",
        ),
    ],
)
def test_a_workflow_with_more_rights_is_found(change, breach):
    workflow = {"on": ["push"], "permissions": {"contents": "read"}, "jobs": {}}
    assert breaches_of(workflow) == []
    (found,) = breaches_of(workflow | change)
    assert found.startswith(breach)
