"""Whether the Hugging Face hub can be reached, found out within a deadline."""

from __future__ import annotations

import os
import threading

_DEADLINE_SECONDS = 3.0


def hub_problem() -> str | None:
    """Why the hub cannot be reached, or None if it answers within the deadline.

    Client libraries retry for up to minutes, and name look-up knows no time limit, so a thread asks and is not waited for.
    """
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return "HF_HUB_OFFLINE is set"
    answer: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            urllib.request.urlopen(request, timeout=_DEADLINE_SECONDS).close()
            answer.append(None)
        except urllib.error.HTTPError:
            answer.append(None)  # it answered
        except OSError as error:
            answer.append(str(getattr(error, "reason", error)))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_DEADLINE_SECONDS)
    return answer[0] if answer else f"{constants.ENDPOINT} did not answer in {_DEADLINE_SECONDS:.0f} s"
