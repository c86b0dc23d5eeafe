"""Tests of course_lib.preflight: each fault is named in one line with the next step, and nothing
broken is imported to find it.
"""

import errno
import subprocess
import sys
from importlib import metadata
from time import perf_counter

import pytest
from packaging.requirements import Requirement

from course_lib import hub, models, preflight, runtime, sealing
from course_lib.runtime import GB, CourseError
from tests.fixtures.packages import PROJECT, disk_with, lines, write_package


def test_this_environment_has_no_problem_even_with_everything_imported(
    course_requires, empty_cache, monkeypatch
):
    """No false alarm: the version that a package says of itself is the one in its metadata."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    course_requires(*PROJECT["dependencies"])
    for line in PROJECT["dependencies"]:
        __import__(Requirement(line).name.replace("-", "_"))
    found = list(preflight.findings())
    assert lines(found, "problem") == []
    subjects = ["Python", "imported", "device", "memory", "base", "disk", "Hub"]
    assert [finding.line.split()[0].rstrip(":") for finding in found] == subjects
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft")]
    assert found[0].line.endswith(", ".join(versions))


def test_no_torch_and_no_transformers_are_imported_when_a_version_is_wrong(course_requires):
    course_requires("accelerate>=99")
    code = (
        "import sys; from course_lib import preflight; print(*preflight.findings(), {'torch', "
        "'transformers'} & {*sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("problem  accelerate")
    assert result.stdout.endswith("set()\n")


def test_one_command_mends_all_packages_and_stands_in_each_line(site, course_requires):
    course_requires("no-such-package>=2", "filelock>=99", 'an-extra>=3; extra == "course"')
    said = lines(preflight.findings(), "problem")
    command = 'pip install "no-such-package>=2" "filelock>=99", then restart the runtime'
    assert said == [
        f"no-such-package is missing, expected >=2: {command}",
        f"filelock {metadata.version('filelock')} found, expected >=99: {command}",
    ]


def test_a_nightly_build_inside_the_range_fits(site, course_requires):
    course_requires("nightly>=2.10")
    write_package(site, "nightly", "2.14.0.dev20261101+cu130")
    assert lines(preflight._versions(), "problem") == []


@pytest.mark.parametrize("python", [">=3.5,<3.6", ">=3.99"])
def test_another_python_is_named_with_the_range_of_the_metadata(course_requires, python):
    course_requires(python=python)
    (said,) = preflight.findings()
    assert said.state == "problem"
    assert said.line.startswith(f"Python {sys.version_info[0]}.{sys.version_info[1]}")
    assert f"expected {python}: " in said.line
    assert "make clean setup PYTHON=python3.12" in said.line


def test_a_checkout_that_was_not_installed_is_one_problem(monkeypatch):
    monkeypatch.setattr(preflight, "DISTRIBUTION", "not-installed-anywhere")
    (said,) = preflight.findings()
    assert (said.state, "pip install -e" in said.line) == ("problem", True)


@pytest.mark.parametrize(
    ("imported", "installed", "stale"),
    [
        ("1.14.0", "1.15.0", True),
        ("1.15.0+cpu", "1.15.0", False),
        ("1.15", "1.15.0", False),
        (None, "1.15.0", False),
    ],
)
def test_a_package_replaced_under_the_running_kernel_is_named(
    site, course_requires, monkeypatch, imported, installed, stale
):
    course_requires("replaced>=1")
    write_package(site, "replaced", "1.14.0", f"__version__ = {imported!r}" if imported else "")
    monkeypatch.delitem(sys.modules, "replaced", raising=False)
    __import__("replaced")
    monkeypatch.setitem(sys.modules, "replaced", sys.modules["replaced"])
    write_package(site, "replaced", installed)
    expected = (
        ["replaced 1.15.0 is installed, but this kernel still runs 1.14.0: restart the runtime"]
        if stale
        else []
    )
    assert lines(preflight._versions(), "problem") == expected


@pytest.mark.parametrize("name", preflight.COMPILED)
def test_a_replaced_package_of_compiled_modules_is_named_though_the_course_does_not_require_it(
    site, course_requires, name
):
    course_requires()
    __import__(name)
    write_package(site, name, "99.0", None)
    assert any(
        line.startswith(f"{name} 99.0 is installed, but this kernel")
        for line in lines(preflight._versions(), "problem")
    )


def test_the_cause_of_a_failed_import_is_named_not_its_wrapper(course_requires, site, monkeypatch):
    course_requires()
    code = (
        "try:\n    import absent\nexcept ImportError as error:\n    raise RuntimeError('could not "
        "import\\nthis') from error\n"
    )
    write_package(site, "wrapped", "1.0", code)
    monkeypatch.setattr(preflight, "IMPORTED", ("wrapped",))
    (said,) = lines(preflight.findings(), "problem")
    assert said.startswith(
        "wrapped cannot be imported (No module named 'absent'): restart the runtime; if it stays "
        "so, pip"
    )
    assert "\n" not in said


@pytest.fixture
def fitting(course_requires, empty_cache, monkeypatch):
    """Versions and imports are fine, without importing anything; the machine is a CPU with 8 GB."""
    course_requires()
    monkeypatch.setattr(preflight, "IMPORTED", ())
    monkeypatch.setattr(
        runtime, "detect", lambda: runtime.decide(None, None, cores=2, memory_bytes=8 * GB)
    )


def test_too_little_memory_is_a_problem_with_two_ways_out(fitting, monkeypatch):
    monkeypatch.setattr(
        runtime, "detect", lambda: runtime.decide(None, None, cores=2, memory_bytes=3 * GB)
    )
    (said,) = lines(preflight.findings(ask_hub=False), "problem")
    assert (
        said == "memory: 3.00 GB, a day takes up to 4.00 GB: "
        'run the notebooks in Colab, or set BASE = "tiny" in their settings'
    )


def test_memory_that_others_use_is_a_note(fitting, monkeypatch):
    import psutil

    whole = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: whole._replace(available=10**9))
    assert "memory: 1.00 GB are free, a day takes up to 4.00 GB: close other programs" in lines(
        preflight.findings(False), "note"
    )
    preflight.require()


def test_an_unknown_device_is_a_problem(fitting, monkeypatch):
    def unknown():
        return runtime.decide(None, "tpu", cores=2, memory_bytes=8 * GB)

    monkeypatch.setattr(runtime, "detect", unknown)
    assert lines(preflight.findings(False), "problem") == [
        "COURSE_DEVICE='tpu' is not known, expected cpu or cuda: correct it or unset it"
    ]


def test_a_full_disk_is_no_problem_where_the_base_model_already_lies(
    fitting, empty_cache, monkeypatch
):
    monkeypatch.setattr(preflight.shutil, "disk_usage", disk_with(1_000_000))
    assert [finding.state for finding in preflight._base_model()] == ["note", "problem"]
    partial = sealing.partial_folder(empty_cache / "smollm2-135m")
    sealing.publish(partial, empty_cache / "smollm2-135m", models.UNPACKED)
    assert [finding.state for finding in preflight._base_model()] == ["ok"]


def test_a_model_that_an_older_course_unpacked_is_a_note(fitting, empty_cache):
    partial = sealing.partial_folder(empty_cache / "smollm2-135m")
    sealing.publish(partial, empty_cache / "smollm2-135m", {"source": models.WHEEL})
    (said,) = lines(preflight._base_model(), "note")
    assert "another edition of the course unpacked it" in said


def test_a_cache_folder_that_cannot_be_made_is_a_problem(fitting, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "file" / "cache"))
    assert lines(preflight._base_model(), "problem") == [
        f"disk: {tmp_path / 'file' / 'cache'} cannot be written: set COURSE_CACHE to a folder of "
        "yours"
    ]


def test_a_damaged_cache_names_the_damage_and_the_rebuilding(fitting, empty_cache):
    partial = sealing.partial_folder(empty_cache / "smollm2-135m")
    (partial / "model.safetensors").write_bytes(b"weights")
    sealing.publish(partial, empty_cache / "smollm2-135m", models.UNPACKED)
    assert [finding.state for finding in preflight._base_model()] == ["ok"]
    (empty_cache / "smollm2-135m" / "model.safetensors").write_bytes(b"weight")
    (said,) = lines(preflight._base_model(), "note")
    assert (
        "is damaged (smollm2-135m/model.safetensors differs from its checksum): a notebook or "
        "`make setup`" in said
    )


@pytest.mark.parametrize(("free", "state"), [(5_000_000_000, "ok"), (4_800_000_000, "note")])
def test_the_room_for_checkpoints_is_that_of_three_full_ones(fitting, monkeypatch, free, state):
    monkeypatch.setattr(preflight.shutil, "disk_usage", disk_with(free))
    finding = preflight._checkpoints()
    assert finding.state == state
    # 3 checkpoints of 3 float32 numbers for each of 134,515,008 weights
    assert "take 4.84 GB" in finding.line
    assert ("free some" in finding.line) == (state == "note")


def test_a_hub_that_is_not_there_is_a_note_and_costs_at_most_the_deadline(monkeypatch):
    import socket

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = perf_counter()
        finding = preflight._hub()
        assert perf_counter() - start < hub.DEADLINE_SECONDS + 0.5
    assert finding.state == "note"
    assert "did not answer" in finding.line or "ReadTimeout" in finding.line


def test_a_hub_that_answers_is_named(monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "probe", asked.append)
    assert str(preflight._hub()) == f"ok       Hub: {hub.endpoint()} answers"
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct"]


def test_require_raises_the_first_problem_and_never_asks_the_hub(
    fitting, course_requires, monkeypatch
):
    monkeypatch.setattr(hub, "probe", lambda *_: pytest.fail("the Hub was asked"))
    preflight.require()
    course_requires("first-missing>=1", "second-missing>=1")
    with pytest.raises(
        CourseError, match="^first-missing is missing, expected >=1: pip install"
    ) as error:
        preflight.require()
    assert "\n" not in str(error.value)


def test_a_base_model_that_cannot_be_read_is_a_note(fitting, empty_cache, monkeypatch):
    def unreadable(folder):
        raise PermissionError(errno.EACCES, "Permission denied")

    (empty_cache / "smollm2-135m").mkdir(parents=True)
    monkeypatch.setattr(sealing, "check", unreadable)
    assert "is damaged ([Errno 13] Permission denied)" in lines(preflight._base_model(), "note")[0]
