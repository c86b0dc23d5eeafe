"""Fixtures shared by the tests: a CPU machine, a tiny base that is new for every test, the real
base, loaded once; a Hub and a cache that a test may break.
"""

import hashlib
import json
import os
import pickle
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from course_lib import adapter_files, hub, models, runtime, sealing
from course_lib.alpaca import Record
from tests.fixtures.broken import Malicious
from tests.fixtures.models import CPU, adapted
from tests.fixtures.packages import course_requires, site  # noqa: F401 (fixtures)

# of the same name, so pytest cannot collect them for their docstrings
collect_ignore_glob = ["conftest.py", "*/conftest.py"]


@pytest.fixture(scope="session")
def machine() -> runtime.Machine:
    return CPU


@pytest.fixture
def tiny(machine: runtime.Machine) -> models.Loaded:
    return models.load("tiny", machine)


@pytest.fixture(scope="session")
def smollm2(machine: runtime.Machine) -> models.Loaded:
    base = models.load("smollm2-135m", machine)
    assert base.name == "smollm2-135m", (
        f"these tests need the real base, which `make setup` fetches: {base.origin}"
    )
    return base


@pytest.fixture(scope="session")
def records() -> list[Record]:
    return [
        Record("Name the capital of Peru.", "Lima"),
        Record("Add the numbers.", "12", input="5 and 7"),
        Record("What is a haiku?", "A short Japanese poem of three lines."),
        Record("Repeat the word.", "stone", input="stone"),
    ]


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Path:
    """A saved adapter of the tiny model."""
    adapter_files.save_adapter(adapted(targets=["q_proj", "v_proj"]), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that a malicious pickle would create, and which proves that it can."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Malicious(path))).close()
    assert path.exists()
    path.unlink()
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip finds nothing and the Hub is switched off."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


@pytest.fixture
def small_wheel(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In place of the real model file and its unpacking, small ones, so that the cache can be
    damaged and rebuilt in no time.

    Returns an empty list, for the lines that are said.
    """

    def gguf_folder(say: models.Say) -> Path:
        return empty_cache

    def unpack(source: Path, target: Path) -> None:
        shutil.copytree(
            models.tiny_folder(),
            target,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns(sealing.SEAL),
        )

    monkeypatch.setattr(models, "_gguf_folder", gguf_folder)
    monkeypatch.setattr(models, "_unpack", unpack)
    return []


@pytest.fixture
def hub_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Set the Hub's address, for a process that has not asked any Hub yet and has nothing of it in
    its cache.
    """
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub" / "hub"))
    monkeypatch.setattr(hub, "_silent", {})
    return lambda address: monkeypatch.setenv("HF_ENDPOINT", address)


@dataclass
class FakeHub:
    """A Hub in which every repository holds the files of `folder`.

    statuses: of the next requests of a method, "HEAD" or "GET"; then it serves
    body: "whole", or what becomes of model.safetensors on its way: "hangs", "hangs half-way", "is
        cut half-way", "is slow"
    asked: the paths it was asked for
    """

    folder: Path = field(default_factory=models.tiny_folder)
    statuses: dict[str, Iterator[int]] = field(default_factory=dict)
    body: str = "whole"
    asked: list[str] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.asked.append(request.path)
        status, content = self._find(request.path.partition("?")[0])
        status = next(self.statuses.get(request.command, iter(())), status)
        content = content if status < 400 else b""
        request.send_response(status)
        request.send_header("Content-Length", str(len(content)))
        request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        request.send_header("X-Repo-Commit", "c" * 40)
        request.end_headers()
        if request.command == "HEAD":
            return
        if self.body == "whole" or not request.path.endswith(".safetensors"):
            request.wfile.write(content)
            return
        if self.body == "is slow":  # 0.6 s longer than a silent Hub is waited for
            piece = len(content) // 16 + 1
            for start in range(0, len(content), piece):
                request.wfile.write(content[start : start + piece])
                self.closed.wait((hub.SILENCE_SECONDS + 0.6) / 16)
        if "half-way" in self.body:
            request.wfile.write(content[: len(content) // 2])
            request.wfile.flush()
        if "hangs" in self.body:
            self.closed.wait(60)

    def _find(self, path: str) -> tuple[int, bytes]:
        """Status and content of a file, or of the two lists that the library asks for."""
        files = [file for file in self.folder.iterdir() if file.is_file()]
        if "/tree/" in path:
            tree = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                for file in files
            ]
            return 200, json.dumps(tree).encode()
        if "/revision/" in path:
            return 200, json.dumps({"id": "owner/name", "sha": "c" * 40, "siblings": []}).encode()
        found = next((file for file in files if path.endswith(f"/{file.name}")), None)
        return (200, found.read_bytes()) if found else (404, b"")


@pytest.fixture
def fake_hub(hub_at: Callable[[str], None]) -> Iterator[FakeHub]:
    fake = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            fake.answer(self)

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub_at(f"http://127.0.0.1:{server.server_port}/")
    yield fake
    fake.closed.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def silent_hub(hub_at: Callable[[str], None]) -> Iterator[None]:
    """A Hub that takes every call and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        hub_at(f"http://127.0.0.1:{server.getsockname()[1]}")
        yield


@pytest.fixture
def closed_hub(hub_at: Callable[[str], None]) -> None:
    """A port at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    hub_at(f"http://127.0.0.1:{port}")
