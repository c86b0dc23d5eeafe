"""The Hugging Face Hub: can this file be had from it now? Asked once, briefly, before any library asks at length.

Left alone, the libraries retry for 40 to 70 seconds against a Hub that is closed, overloaded or silent. One small request with
a deadline tells the same. HF_ENDPOINT (a mirror) and HF_HUB_OFFLINE are honoured.
"""

import os
import threading
from time import sleep

from course_lib.runtime import CourseError

DEADLINE_SECONDS = 3.0  # for name lookup, connection and answer together
RETRY_SECONDS = 1.0


class HubError(CourseError):
    """The Hub does not serve this file now; the message says why."""


def endpoint() -> str:
    """The Hub's address, or the mirror in HF_ENDPOINT."""
    return (os.environ.get("HF_ENDPOINT", "").strip() or "https://huggingface.co").rstrip("/")


def probe(repository: str, filename: str = "config.json", deadline: float = DEADLINE_SECONDS) -> None:
    """Return if `filename` of `repository` can be downloaded, else raise HubError.

    repository: "owner/name" of a model, or "datasets/owner/name"
    A busy Hub (429 or 5xx) is asked a second time; the two requests together take at most 2 * deadline + 1 seconds.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise HubError("HF_HUB_OFFLINE is set")
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


def _status(url: str, deadline: float) -> int:
    """The HTTP status of `url` without its body. A thread keeps the deadline, because name lookup knows no timeout."""
    import httpx
    from huggingface_hub import get_token

    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    answer: list[int | str] = []

    def ask() -> None:
        try:
            answer.append(httpx.head(url, headers=headers, timeout=deadline).status_code)
        except Exception as error:  # whatever a proxy or a token can do wrong: the Hub is not there
            answer.append(type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(deadline)
    if not answer:
        raise HubError(f"{endpoint()} did not answer within {deadline:g} s")
    if isinstance(answer[0], str):
        raise HubError(f"{endpoint()} cannot be reached ({answer[0]})")
    return answer[0]
