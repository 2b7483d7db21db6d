"""Who is answered by the page's server, and what: over real connections."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from lightning_chatgpt.chat.conversation import Message
from lightning_chatgpt.errors import ConfigError, SaveError
from lightning_chatgpt.evaluation.blind_server import ADDRESS, Judging, bind, check_serving, serve
from lightning_chatgpt.evaluation.votes import Pair, VoteFile

pytest.importorskip("uvicorn", reason="needs the extra serve")

NAMES = {"A": "runs/secret-a", "B": "runs/secret-b"}
IDENTITIES = ("0123", "4567")


def make_judging(folder: Path, *, n_pairs: int = 3, rater: str = "r1", identities: tuple[str, str] = IDENTITIES, seed: int = 0) -> Judging:
    swapped = identities != IDENTITIES
    pairs = []
    for i in range(1, n_pairs + 1):
        one, other = f"{i} one", f"{i} other"
        prompt = (Message("system", "Be brief."), Message("user", f"<b>question {i}</b>", name="Sam"))
        pairs.append(Pair(f"p{i}", prompt, {"A": other, "B": one} if swapped else {"A": one, "B": other}, frozenset({"B"})))
    file = VoteFile(folder / "votes.jsonl", pairs={pair.id: pair for pair in pairs}, models=NAMES)
    return Judging(pairs, file=file, rater=rater, identities=identities, seed=seed)


def lefts(judging: Judging) -> list[str]:
    return [judging.view(i)["replies"][0]["content"].split()[1] for i in range(1, len(judging.pairs) + 1)]


def test_sides_are_drawn_evenly_and_stay(tmp_path: Path) -> None:
    first = lefts(make_judging(tmp_path, n_pairs=400))
    assert 160 <= first.count("one") <= 240  # 200 expected, four standard deviations either way
    assert lefts(make_judging(tmp_path, n_pairs=400)) == first
    for other in (lefts(make_judging(tmp_path, n_pairs=400, rater="r2")), lefts(make_judging(tmp_path, n_pairs=400, seed=1))):
        assert 160 <= sum(a == b for a, b in zip(first, other, strict=True)) <= 240


def test_sides_do_not_tell_which_model_was_named_first(tmp_path: Path) -> None:
    assert lefts(make_judging(tmp_path, n_pairs=50, identities=IDENTITIES[::-1])) == lefts(make_judging(tmp_path, n_pairs=50))


@pytest.mark.parametrize("choice", [1, 2, 3, 4])
def test_a_choice_is_kept_as_the_model_that_was_shown_there(tmp_path: Path, choice: int) -> None:
    judging = make_judging(tmp_path, n_pairs=20)
    for number, pair in enumerate(judging.pairs, start=1):
        shown = [reply["content"] for reply in judging.view(number)["replies"]]
        judging.vote(number, choice)
        vote = judging.file.votes["r1", pair.id]
        assert pair.replies[vote.left] == shown[0]
        if choice <= 2:
            assert pair.replies[vote.vote] == shown[choice - 1]  # type: ignore[index]
        else:
            assert vote.vote == ("tie", "both_bad")[choice - 3]
        assert judging.view(number)["choice"] == choice


def test_the_first_that_is_not_judged_is_shown_and_one_can_go_back(tmp_path: Path) -> None:
    judging = make_judging(tmp_path)
    assert (judging.view()["number"], judging.view()["n_judged"], judging.view()["choice"]) == (1, 0, None)
    judging.vote(1, 3)
    assert (judging.view()["number"], judging.view()["n_judged"]) == (2, 1)
    judging.vote(1, 3)  # said again: nothing new to keep
    judging.vote(1, 4)
    again = make_judging(tmp_path)
    assert again.view() == judging.view()
    assert again.view(1)["choice"] == 4
    assert len((tmp_path / "votes.jsonl").read_text().splitlines()) == 2
    judging.vote(2, 1)
    judging.vote(3, 1)
    assert judging.view() == {"number": None, "n_pairs": 3, "n_judged": 3}
    assert make_judging(tmp_path, rater="r2").view()["n_judged"] == 0


class Client:
    """Asks a server; ``sent`` holds all that it ever answered."""

    def __init__(self, address: str) -> None:
        self.parts = urlsplit(address)
        self.key = self.parts.query
        self.sent = ""

    def ask(self, path: str, *, query: str | None = None, body: Any = None, method: str = "", **headers: str) -> tuple[HTTPResponse, str]:
        connection = HTTPConnection(self.parts.hostname or "", self.parts.port or 0, timeout=30)
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method or ("GET" if data is None else "POST"), f"{path}?{self.key if query is None else query}", data, headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        self.sent += text + str(response.getheaders())
        return response, text


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    listening = bind(0)
    assert listening.getsockname()[0] == "127.0.0.1"
    judging = make_judging(tmp_path)
    known: list[str] = []
    server = threading.Thread(
        target=serve, args=(judging,), kwargs={"listening": listening, "finish": lambda: ["The first wins."], "announce": known.append}
    )
    server.start()
    while not known:
        assert server.is_alive()
    client = Client(known[0])
    yield client
    while judging.n_judged < len(judging.pairs):
        judging.vote(judging.view()["number"], 3)
    if server.is_alive():
        client.ask("/finish", body={})
    server.join(timeout=30)
    assert not server.is_alive()  # it ends when all is judged and finished
    assert "secret" not in client.sent  # no model's name was ever sent


def test_the_page_is_served_to_who_knows_the_key(client: Client) -> None:
    response, text = client.ask("/")
    assert response.status == 200 and "<h1" in text
    policy = response.headers["Content-Security-Policy"]
    nonce = policy.split("'nonce-")[1].split("'")[0]
    assert f'<script nonce="{nonce}">' in text and text.count("<script") == 1
    assert policy.startswith("default-src 'none'; ") and "http" not in policy and "*" not in policy
    assert "http:" not in text and "https:" not in text and "//" not in text.replace("  // ", "")
    assert nonce not in client.ask("/")[1]


def test_who_does_not_know_the_key_gets_one_line(client: Client) -> None:
    for query in ("", "key=", "key=wrong", "key=%C3%A9", "key=%FF&key=wrong", "key", f"{client.key}x", client.key[:-1]):
        for path in ("/", "/view", "/vote", "/finish", "/other"):
            response, text = client.ask(path, query=query, body={"number": 1, "choice": 1} if path in ("/vote", "/finish") else None)
            assert response.status == 403
            assert text == "The key is missing or wrong: open the address that the command printed."
    assert json.loads(client.ask("/view")[1])["n_judged"] == 0


def test_a_server_by_another_name_is_refused(client: Client) -> None:
    """Guards against a page of elsewhere whose name is made to mean this machine."""
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        assert client.ask("/view", Host=host)[0].status == 400
    assert client.ask("/view", Host=f"localhost:{client.parts.port}")[0].status == 200


def test_a_vote_from_another_page_is_refused(client: Client) -> None:
    ours = f"http://{ADDRESS}:{client.parts.port}"
    for origin in ("https://evil.example", "null", "http://127.0.0.1", ours.replace("http", "https"), f"{ours}.evil.example"):
        response, text = client.ask("/vote", body={"number": 1, "choice": 1}, Origin=origin)
        assert (response.status, text) == (403, "Votes are taken from the page itself alone.")
    assert json.loads(client.ask("/vote", body={"number": 1, "choice": 1}, Origin=ours)[1])["n_judged"] == 1


def test_every_answer_stays_on_the_machine(client: Client) -> None:
    for path, query in (("/", None), ("/view", None), ("/", ""), ("/other", None), ("/favicon.ico", "")):
        headers = client.ask(path, query=query)[0].headers
        assert headers["Cache-Control"] == "no-store" and headers["Referrer-Policy"] == "no-referrer"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "Access-Control-Allow-Origin" not in headers


def test_votes_go_in_and_the_next_pair_comes_out(client: Client) -> None:
    _, text = client.ask("/view")
    view = json.loads(text)
    assert view["prompt"] == [
        {"role": "system", "name": "", "content": "Be brief."},
        {"role": "user", "name": "Sam", "content": "<b>question 1</b>"},
    ]
    assert sorted(reply["content"] for reply in view["replies"]) == ["1 one", "1 other"]
    assert {reply["content"]: reply["is_cut"] for reply in view["replies"]} == {"1 one": False, "1 other": True}
    assert set(view) == {"number", "n_pairs", "n_judged", "prompt", "replies", "choice"}
    assert client.ask("/finish", body={})[0].status == 409
    for number in (1, 2, 3):
        _, text = client.ask("/vote", body={"number": number, "choice": 3})
    assert json.loads(text) == {"number": None, "n_pairs": 3, "n_judged": 3}
    assert json.loads(client.ask("/view", query=f"{client.key}&number=2")[1])["choice"] == 3
    assert json.loads(client.ask("/finish", body={})[1])["result"] == ["The first wins."]


def test_what_is_no_vote_is_refused(client: Client) -> None:
    numbers = [{}, {"number": 1}, {"number": True, "choice": 1}, {"number": "1", "choice": 1}, {"number": 1, "choice": 1.5}]
    outside = [{"number": 0, "choice": 1}, {"number": 4, "choice": 1}, {"number": 1, "choice": 0}, {"number": 1, "choice": 5}]
    for body in (b"", b"{", b"\xff", b"[]", *numbers, *outside):
        response, text = client.ask("/vote", body=body)
        assert (response.status, text) == (400, "A vote has the number of a pair and a choice from 1 to 4.")
    assert json.loads(client.ask("/view")[1])["n_judged"] == 0


def test_a_number_beyond_the_pairs_shows_the_first_that_is_open(client: Client) -> None:
    for number in ("0", "4", "-1", "x", "9" * 6000):
        assert json.loads(client.ask("/view", query=f"{client.key}&number={number}")[1])["number"] == 1


def test_the_page_is_told_of_a_vote_that_could_not_be_saved(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_full(self: VoteFile, vote: Any) -> None:
        raise SaveError("votes.jsonl: the vote could not be saved")

    with monkeypatch.context() as patch:
        patch.setattr(VoteFile, "add", is_full)
        response, text = client.ask("/vote", body={"number": 1, "choice": 1})
    assert (response.status, text) == (507, "votes.jsonl: the vote could not be saved")


def test_a_port_that_cannot_be_had_is_one_line() -> None:
    with bind(0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"^port {port} cannot be used \(Address already in use\); name another, or 0 for one that is free$"
        ):
            bind(port)
    bind(port).close()
    for port in (-1, 65536):
        with pytest.raises(ConfigError, match=rf"^port {port} cannot be used \(there is no such port\)"):
            bind(port)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"pip install 'lightning-chatgpt\[serve\]'$"):
        check_serving()
