"""The Hugging Face Hub: can this file be had from it now?

Asked once, briefly, before any library asks at length.

Left alone, the libraries retry for 40 to 70 seconds against a Hub that is closed, overloaded or
silent, and for minutes against one that hangs in a download. One small request with a deadline
tells whether it is there; a download ends when nothing arrives any more; a Hub that was silent once
is not waited for a second time. HF_ENDPOINT (a mirror) and HF_HUB_OFFLINE are honoured.
"""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, sleep

from course_lib.runtime import CourseError, first_line

DEADLINE_SECONDS = 3.0  # for name lookup, connection and answer together
RETRY_SECONDS = 1.0
SILENCE_SECONDS = 5.0  # a download in which nothing arrives for so long is given up
# written to disk as they arrive: less than this in SILENCE_SECONDS, 13 kB/s, counts as nothing
PIECE_BYTES = 2**16
SILENT = 3  # exit code of a download that was given up

# the endpoints that this process has waited for in vain, and what to say about them
_silent: dict[str, str] = {}


class HubError(CourseError):
    """The Hub does not serve this file now; the message says why."""


def endpoint() -> str:
    """The Hub's address, or the mirror in HF_ENDPOINT."""
    return (os.environ.get("HF_ENDPOINT", "").strip() or "https://huggingface.co").rstrip("/")


def probe(
    repository: str, filename: str = "config.json", deadline: float = DEADLINE_SECONDS
) -> None:
    """Return if `filename` of `repository` can be downloaded, else raise HubError.

    repository: "owner/name" of a model, or "datasets/owner/name"

    A busy Hub (429 or 5xx) is asked a second time; the two requests together take at most
    2 * deadline + 1 seconds. A Hub that did not answer is not asked again by this process.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise HubError("HF_HUB_OFFLINE is set")
    if endpoint() in _silent:
        raise HubError(_silent[endpoint()])
    url = f"{endpoint()}/{repository}/resolve/main/{filename}"
    status = _status(url, deadline)
    if status == 429 or status >= 500:
        sleep(RETRY_SECONDS)
        status = _status(url, deadline)
    if status in (401, 403):
        advice = f"accept its licence on {endpoint()} and log in, or use an open model"
        raise HubError(f"{repository} is gated, private or absent ({status}): {advice}")
    if status == 404:
        raise HubError(f"{endpoint()} has no {repository}/{filename} (404)")
    if status >= 400:
        raise HubError(f"{endpoint()} answered {status} twice")


def cached(repository: str) -> Path | None:
    """The folder of a model in the Hub's cache on this machine, perhaps with files missing, or
    None. Asks nothing.
    """
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repository, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def download(repository: str, patterns: Sequence[str] = ()) -> Path:
    """The folder of `repository` in the Hub's cache on this machine, after what is missing there
    was fetched.

    repository: as for `probe`, which is asked first
    patterns: which files to fetch from the top of the repository, one pattern after the other; all
        files if there are none

    Raises HubError, for a Hub that hangs after SILENCE_SECONDS. Only a process can be stopped in
    the middle of a request, so another one downloads; without Xet, whose transfers have long pauses
    of their own.
    """
    from huggingface_hub import constants

    path = os.pathsep.join(
        filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
    )
    environment = {
        "PYTHONPATH": path,
        "HF_HUB_CACHE": str(constants.HF_HUB_CACHE),
        "HF_HUB_DISABLE_XET": "1",
    }
    result = subprocess.run(
        [sys.executable, "-m", "course_lib.hub", repository, *patterns],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    if result.returncode == SILENT:
        raise _silence(f"sent nothing new for {SILENCE_SECONDS:g} s in the middle of a download")
    if result.returncode != 0:
        reason = (result.stderr.strip() or f"exit code {result.returncode}").splitlines()[-1]
        raise HubError(f"{repository} could not be downloaded from {endpoint()} ({reason})")
    return Path(result.stdout.splitlines()[-1])


def _fetch(repository: str, patterns: Sequence[str]) -> None:
    """What `download` runs: fetch and print the folder, or exit as soon as the cache has not grown
    for SILENCE_SECONDS.
    """
    import psutil
    from huggingface_hub import constants, snapshot_download

    constants.DOWNLOAD_CHUNK_SIZE = PIECE_BYTES
    name = repository.removeprefix("datasets/")
    kind = "model" if name == repository else "dataset"
    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"

    def watch() -> None:
        largest, last = 0, perf_counter()
        while perf_counter() - last < SILENCE_SECONDS:
            sleep(0.1)
            with contextlib.suppress(OSError):  # a file was renamed while we looked
                size = sum(path.lstat().st_size for path in folder.rglob("*"))
                if size > largest:
                    largest, last = size, perf_counter()
        with contextlib.suppress(OSError):  # the library would leave its half files for ever
            for file in psutil.Process().open_files():
                if file.path.endswith(".incomplete"):
                    os.unlink(file.path)
        os._exit(SILENT)

    threading.Thread(target=watch, daemon=True).start()
    try:
        for pattern in patterns or [None]:
            path = snapshot_download(
                name,
                repo_type=kind,
                allow_patterns=pattern,
                ignore_patterns="*/*" if pattern else None,
            )
        print(path)
    except Exception as error:  # whatever the library raises; the cause says more than its advice
        sys.exit(first_line(error.__cause__ or error))


def _silence(what: str) -> HubError:
    """The error for an endpoint that is silent, which is remembered."""
    _silent[endpoint()] = f"{endpoint()} {what} (restart the kernel to ask it again)"
    return HubError(_silent[endpoint()])


def _status(url: str, deadline: float) -> int:
    """The HTTP status of `url` without its body.

    A thread keeps the deadline, because name lookup knows no timeout.
    """
    import httpx
    from huggingface_hub import get_token

    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    answer: list[int | str] = []

    def ask() -> None:
        try:
            answer.append(httpx.head(url, headers=headers, timeout=2 * deadline).status_code)
        except Exception as error:  # whatever a proxy or a token can do wrong: the Hub is not there
            answer.append(type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(deadline)
    if not answer:
        raise _silence(f"did not answer within {deadline:g} s")
    if isinstance(answer[0], str):
        raise HubError(f"{endpoint()} cannot be reached ({answer[0]})")
    return answer[0]


if __name__ == "__main__":
    _fetch(sys.argv[1], sys.argv[2:])
