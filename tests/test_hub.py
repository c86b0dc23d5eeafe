"""Tests of course_lib.hub against a fake Hub on this machine."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import perf_counter

import pytest

from course_lib import hub


@pytest.fixture
def fake_hub(monkeypatch):
    """A server that answers with the statuses it is given, one a request, and remembers the paths asked for."""
    statuses, paths = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            paths.append(self.path)
            self.send_response(statuses.pop(0))
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "RETRY_SECONDS", 0.01)
    yield statuses, paths
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("status", [200, 302, 307])
def test_a_hub_that_has_the_file_passes(fake_hub, status):
    statuses, paths = fake_hub
    statuses.append(status)
    hub.probe("owner/model")
    assert paths == ["/owner/model/resolve/main/config.json"]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([401], "gated, private or absent .401.: accept its licence"),
        ([403], "gated, private or absent .403.: accept its licence"),
        ([404], "has no owner/model/config.json"),
        ([429, 429], "answered 429 twice"),
        ([500, 503], "answered 503 twice"),
    ],
)
def test_a_refusal_is_named_in_one_line(fake_hub, answers, message):
    statuses, paths = fake_hub
    statuses += answers
    with pytest.raises(hub.HubError, match=message) as error:
        hub.probe("owner/model")
    assert "\n" not in str(error.value)
    assert len(paths) == len(answers)


def test_a_busy_hub_gets_one_second_chance(fake_hub):
    statuses, _ = fake_hub
    statuses += [500, 200]
    hub.probe("owner/model")


def test_a_hub_that_never_answers_costs_the_deadline_and_no_more(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        start = perf_counter()
        with pytest.raises(hub.HubError, match=r"did not answer within 0\.5 s|ReadTimeout"):
            hub.probe("owner/model", deadline=0.5)
        assert perf_counter() - start < 1.5
    assert hub.DEADLINE_SECONDS <= 3


def test_a_closed_port_is_named(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(hub.HubError, match="cannot be reached"):
        hub.probe("owner/model")


@pytest.mark.parametrize("address", ["nonsense", "http://", "http://[half"])
def test_an_endpoint_that_is_no_address_is_named(monkeypatch, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(hub.HubError, match="cannot be reached"):
        hub.probe("owner/model")


def test_offline_mode_asks_nothing(fake_hub, monkeypatch):
    _, paths = fake_hub
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(hub.HubError, match="HF_HUB_OFFLINE is set"):
        hub.probe("owner/model")
    assert paths == []
