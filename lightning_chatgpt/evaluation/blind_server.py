"""The page that shows pairs without names, on this machine alone: what it is sent, what it may send, and who may ask.

Nobody but who knows the key is answered, nothing the browser shows may leave the machine, and nothing it is sent names a model.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from lightning_chatgpt.errors import ConfigError, SaveError
from lightning_chatgpt.evaluation.votes import MODELS, VERDICTS, Model, Pair, Verdict, Vote, VoteFile

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ADDRESS = "127.0.0.1"
PAGE = "evaluation/blind.html.jinja"

_KEY_BYTES = 24
_UNDECIDED: tuple[Verdict, ...] = VERDICTS[2:]


class Judging:
    """One person's way through the pairs.

    Args:
        pairs: What is judged, in order.
        file: Where votes go.
        rater: Who judges.
        identities: What tells model A and B from all others.
        seed: With rater and pair it decides which of the two models is shown left, whichever was named first.
    """

    def __init__(self, pairs: Sequence[Pair], *, file: VoteFile, rater: str, identities: Sequence[str], seed: int) -> None:
        self.pairs = pairs
        self.file = file
        self.rater = rater
        self.seed = seed
        self._in_order: tuple[Model, ...] = MODELS if identities[0] < identities[1] else MODELS[::-1]

    @property
    def n_judged(self) -> int:
        """Pairs that this person has voted on."""
        return sum((self.rater, pair.id) in self.file.votes for pair in self.pairs)

    def sides(self, pair: Pair) -> tuple[Model, Model]:
        """The model that is shown left, and the one on the right; the same each time."""
        digest = hashlib.blake2b(json.dumps([self.seed, self.rater, pair.id]).encode(), digest_size=1).digest()
        one, other = self._in_order
        return (one, other) if digest[0] % 2 else (other, one)

    def view(self, number: int | None = None) -> dict[str, Any]:
        """What the page shows.

        Args:
            number: The pair's, from 1; None for the first that is not judged.

        Returns: the pair, without a name of a model; its ``number`` is null where all are judged.
        """
        if number is None:
            left_open = (i for i, pair in enumerate(self.pairs, start=1) if (self.rater, pair.id) not in self.file.votes)
            number = next(left_open, None)
        about = {"number": number, "n_pairs": len(self.pairs), "n_judged": self.n_judged}
        if number is None:
            return about
        pair = self.pairs[number - 1]
        sides = self.sides(pair)
        vote = self.file.votes.get((self.rater, pair.id))
        return {
            **about,
            "prompt": [{"role": message.role, "name": message.name, "content": message.content} for message in pair.prompt],
            "replies": [{"content": pair.replies[model], "is_cut": model in pair.cut} for model in sides],
            "choice": (*sides, *_UNDECIDED).index(vote.vote) + 1 if vote is not None else None,
        }

    def vote(self, number: int, choice: int) -> None:
        """Write down what was chosen: 1 left, 2 right, 3 tie, 4 both bad.

        Raises:
            SaveError: It could not be written.
        """
        pair = self.pairs[number - 1]
        sides = self.sides(pair)
        verdict = (*sides, *_UNDECIDED)[choice - 1]
        before = self.file.votes.get((self.rater, pair.id))
        if before is None or before.vote != verdict:
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            self.file.add(Vote(pair.id, verdict, sides[0], self.rater, now))


def check_serving() -> None:
    """Make sure that pages can be served.

    Raises:
        ConfigError: A package is not installed.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"the page is served by starlette and uvicorn, which cannot be imported ({error}): pip install 'lightning-chatgpt[serve]'"
        ) from None


def bind(port: int) -> socket.socket:
    """Take a port of this machine, which no other machine reaches.

    Args:
        port: Its number; 0 for one that is free.

    Raises:
        ConfigError: It is taken, or none.
    """
    taken = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if os.name != "nt":  # there it would take a port from who has it
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was left a moment ago is free
    try:
        taken.bind((ADDRESS, port))
        taken.listen()
    except (OSError, OverflowError) as error:
        taken.close()
        reason = getattr(error, "strerror", None) or "there is no such port"
        raise ConfigError(f"port {port} cannot be used ({reason}); name another, or 0 for one that is free") from None
    return taken


def serve(judging: Judging, *, listening: socket.socket, finish: Callable[[], Sequence[str]], announce: Callable[[str], None]) -> None:
    """Serve the page until everything is judged and finished, or Ctrl-C.

    Args:
        judging: What is shown.
        listening: The port, as :func:`bind` took it; closed at the end.
        finish: Called when everything is judged; the lines that it returns are shown on the page.
        announce: Told the page's address, with its key.
    """
    import uvicorn

    key = secrets.token_urlsafe(_KEY_BYTES)

    def end() -> Sequence[str]:
        told = finish()
        server.should_exit = True  # once this is answered
        return told

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            announce(f"http://{ADDRESS}:{listening.getsockname()[1]}/?key={key}")  # now it answers, and ends in order

    # No log of requests: it would hold the key.
    config = uvicorn.Config(
        make_app(judging, key=key, finish=end), log_level="error", access_log=False, lifespan="off", ws="none", proxy_headers=False
    )
    server = Server(config)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn has answered what was asked, and hands it on
        server.run(sockets=[listening])


def make_app(judging: Judging, *, key: str, finish: Callable[[], Sequence[str]]) -> Starlette:
    """The page and what it asks for.

    Args:
        judging: What is shown.
        key: Who does not know it is sent away.
        finish: Called when everything is judged; the lines that it returns are shown.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    from lightning_chatgpt.pages.render import render

    def number_of(value: Any, most: int) -> int | None:
        return value if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most else None

    async def page(request: Request) -> Response:
        return HTMLResponse(render(PAGE, report={}, nonce=request.state.nonce))

    async def view(request: Request) -> Response:
        asked = request.query_params.get("number", "")
        number = number_of(int(asked[:9]), len(judging.pairs)) if asked.isdecimal() else None
        return JSONResponse(judging.view(number))

    async def vote(request: Request) -> Response:
        try:
            body = await request.json()
        except ValueError:
            body = None
        given: Mapping[str, Any] = body if isinstance(body, dict) else {}
        number, choice = number_of(given.get("number"), len(judging.pairs)), number_of(given.get("choice"), len(VERDICTS))
        if number is None or choice is None:
            return PlainTextResponse("A vote has the number of a pair and a choice from 1 to 4.", 400)
        try:
            judging.vote(number, choice)
        except SaveError as error:
            return PlainTextResponse(str(error), 507)
        return JSONResponse(judging.view())

    async def end(request: Request) -> Response:
        if judging.n_judged < len(judging.pairs):
            return PlainTextResponse("Not everything is judged yet.", 409)
        try:
            result = list(finish())
        except SaveError as error:
            return PlainTextResponse(str(error), 507)
        return JSONResponse({**judging.view(), "result": result})

    async def no_icon(request: Request) -> Response:
        return Response(status_code=204)  # browsers ask for it by themselves

    return Starlette(
        routes=[
            Route("/", page),
            Route("/view", view),
            Route("/vote", vote, methods=["POST"]),
            Route("/finish", end, methods=["POST"]),
            Route("/favicon.ico", no_icon),
        ],
        # A page of elsewhere may call this machine by a name of its own.
        middleware=[
            Middleware(Guard, key=key),
            Middleware(TrustedHostMiddleware, allowed_hosts=[ADDRESS, "localhost"], www_redirect=False),
        ],
    )


class Guard:
    """Sends away who does not know the key, and what pages of elsewhere send; keeps what is shown on the machine.

    Args:
        app: What is guarded.
        key: In the query of every address.
    """

    def __init__(self, app: ASGIApp, *, key: str) -> None:
        self.app = app
        self.key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        from starlette.datastructures import Headers, MutableHeaders, QueryParams
        from starlette.responses import PlainTextResponse

        if scope["type"] != "http":
            return
        nonce = secrets.token_urlsafe(_KEY_BYTES)
        scope.setdefault("state", {})["nonce"] = nonce
        policy = (
            f"default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; connect-src 'self'; img-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = policy
                headers["Cache-Control"] = "no-store"
                headers["Referrer-Policy"] = "no-referrer"  # the address holds the key
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Cross-Origin-Resource-Policy"] = "same-origin"
            await send(message)

        headers = Headers(scope=scope)
        given = QueryParams(scope["query_string"]).get("key", "").encode()
        answer: ASGIApp = self.app
        if scope["path"] != "/favicon.ico" and not hmac.compare_digest(given, self.key):
            answer = PlainTextResponse("The key is missing or wrong: open the address that the command printed.", 403)
        elif scope["method"] != "GET" and headers.get("origin", origin := f"http://{headers.get('host')}") != origin:
            answer = PlainTextResponse("Votes are taken from the page itself alone.", 403)
        await answer(scope, receive, guarded)
