"""Tests of what a user installs: one list of versions, a wheel that holds its data, a README whose
links lead somewhere.
"""

import importlib
import operator
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "course_lib"
MODULES = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} | {
    path.parent.name for path in PACKAGE.glob("*/__init__.py")
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COLAB = {
    "torch": "2.11.0",
    "transformers": "5.15.0",
    "peft": "0.20.0",
    "accelerate": "1.14.0",
    "datasets": "4.0.0",
    "matplotlib": "3.10.0",
}


def constraints():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def requirements():
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


def test_every_requirement_has_a_range_and_a_tested_version_in_it():
    tested = constraints()
    for requirement in requirements():
        assert "==" not in str(requirement), (
            f"{requirement}: exact versions belong in constraints.txt"
        )
        assert requirement.name in tested, f"{requirement.name} is missing in constraints.txt"
        assert requirement.specifier.contains(tested[requirement.name]), (
            f"{requirement} excludes {tested[requirement.name]}"
        )


def test_the_ranges_admit_what_colab_has():
    for requirement in requirements():
        if requirement.name in COLAB:
            assert requirement.specifier.contains(COLAB[requirement.name]), requirement


def test_constraints_are_exact_and_carry_no_local_version():
    for name, version in constraints().items():
        assert str(Version(version)) == version, name
        assert "+" not in version


def test_the_conda_environment_installs_the_same():
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert "-c constraints.txt" in text
    assert "-e .[course,test]" in text
    python = re.search(r"python=([\d.]+)", text).group(1)
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python)
    for line in text.splitlines():
        if re.match(r"\s+- (python|--|-c|-e)", line):
            assert "#" in line, f"no reason given: {line}"


def test_an_installed_wheel_finds_its_data(tmp_path):
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True, text=True)
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    (wheel,) = tmp_path.glob("*.whl")
    site = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"],
        capture_output=True,
        text=True,
        check=True,
    )
    import zipfile

    zipfile.ZipFile(wheel).extractall(site.stdout.strip())
    code = (
        "from course_lib import alpaca, runtime; "
        "print(alpaca.read_records(runtime.data_folder() / 'structured_answers.json', ('split', "
        "'topic', 'entity', 'phrasing')))"
    )
    result = subprocess.run(
        [python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "0 refused" in result.stdout


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "docs/decisions.md", "data/README.md"]
)
def test_links_between_files_lead_somewhere(document):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target).exists(), target


def test_the_readme_names_every_module_and_target_that_exists():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for module in MODULES:
        assert f"`{module}`" in readme, module
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):.*##", makefile, re.M))
    assert set(re.findall(r"`make ([a-z]+)", readme)) <= targets


def test_the_package_table_names_every_module():
    import course_lib

    named = set(re.findall(r"^\| \w+ +\| `(\w+)`", course_lib.__doc__, re.M))
    assert named == MODULES


def test_every_module_has_its_test_file():
    for module in MODULES:
        assert (ROOT / "tests" / f"test_{module.strip('_')}.py").is_file(), module


def test_the_way_of_a_record_names_functions_that_exist_and_not_many():
    import course_lib

    way = course_lib.__doc__.partition("The way of a record")[2]
    names = re.findall(r"`([\w.]+)`", way)
    module, found = None, []
    for name in names:
        owner, _, last = name.rpartition(".")
        if owner and owner.islower():
            module = importlib.import_module(f"course_lib.{owner}")
            found.append(getattr(module, last))
        else:
            found.append(operator.attrgetter(name)(module))
    assert len(found) <= 15
