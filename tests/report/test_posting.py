"""Posting, against a stand-in for the hosts on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from ci_examples import failing, passing, recipe_error

from optimize.report import posting
from optimize.report.markdown import comment, marker
from optimize.report.outputs import write_reports
from optimize.report.posting import PostingError, post_to_github, post_to_gitlab

TOKEN = "ghp_DoNotTellAnybody0123456789"
BOT, PERSON = {"login": "github-actions[bot]", "type": "Bot", "id": 7}, {"login": "mallory", "type": "User", "id": 8}


@dataclass
class Host:
    """Comments, and how the next requests are answered."""

    url: str = ""
    comments: list[dict[str, Any]] = field(default_factory=list)
    pulls: list[dict[str, Any]] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    trouble: Callable[[str, str], int | None] = lambda method, path: None
    """A status to answer with, 0 for no answer at all; None for the real thing."""
    me: dict[str, Any] | None = None
    """What `/user` says; a job's own token may not ask."""

    def add(self, user: dict[str, Any], body: str) -> dict[str, Any]:
        one = {"id": len(self.comments) + 1, "user": user, "author": user, "body": body, "html_url": "https://h/c"}
        self.comments.append(one)
        return one

    def written(self) -> list[str]:
        return [one["body"] for one in self.comments]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    state, silent = Host(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
            path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
            state.requests.append((self.command, path))
            state.tokens.add(self.headers.get("Authorization") or self.headers.get("PRIVATE-TOKEN") or "")
            status = state.trouble(self.command, path)
            if status == 0:
                silent.wait(30)
                return
            result: Any = {"message": f"you sent {dict(self.headers)}"}
            if status is None:
                status, result = self.serve(path, query, body)
            raw = json.dumps(result).encode()
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", f"{state.url}/elsewhere")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_POST = do_PATCH = do_PUT = answer

        def serve(self, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
            if path == "/user":
                return (200, state.me) if state.me else (403, {})
            page, size = int(query.get("page", ["1"])[0]), int(query.get("per_page", ["30"])[0])
            cut = slice((page - 1) * size, page * size)
            if path.endswith("/pulls"):
                return 200, [one for one in state.pulls if one["of"] == query["head"][0]][cut]
            if self.command == "GET":
                return 200, state.comments[cut]
            if self.command == "POST":
                return 201, state.add(state.me or BOT, body["body"])
            number = int(path.rsplit("/", 1)[1])
            state.comments[number - 1]["body"] = body["body"]
            return 200, state.comments[number - 1]

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setattr(posting.time, "sleep", lambda _: None)
    yield state
    silent.set()
    server.shutdown()
    thread.join()
    server.server_close()


def github(host: Host, **more: str) -> dict[str, str]:
    known = {"GITHUB_TOKEN": TOKEN, "GITHUB_REPOSITORY": "o/r", "GITHUB_REF": "refs/pull/12/merge"}
    return {**known, "GITHUB_API_URL": host.url, **more}


def gitlab(host: Host, **more: str) -> dict[str, str]:
    known = {"GITLAB_TOKEN": TOKEN, "CI_PROJECT_ID": "42", "CI_MERGE_REQUEST_IID": "3"}
    return {**known, "CI_API_V4_URL": host.url, **more}


def test_a_comment_is_written_once_and_then_updated_in_place(host: Host) -> None:
    for number in range(250):
        host.add(PERSON, f"comment {number}")
    post_to_github(failing(), github(host))
    assert host.written()[250:] == [comment(failing())]
    post_to_github(passing(), github(host))
    assert host.written()[250:] == [comment(passing())]
    assert host.requests[-1] == ("PATCH", "/repos/o/r/issues/comments/251")
    other = {**passing(), "recipe": "another"}
    post_to_github(other, github(host))
    assert len(host.comments) == 252
    assert host.tokens == {f"Bearer {TOKEN}"}


def test_a_comment_of_somebody_else_is_left_alone(host: Host) -> None:
    forged = f"look\n{marker(passing())}\n"
    host.add(PERSON, forged)
    host.add(BOT, f"> {marker(passing())}\n\nquoted")
    post_to_github(passing(), github(host))
    assert host.written()[0] == forged
    assert len(host.comments) == 3
    host.me = {"login": "mallory", "id": 8}
    post_to_github(failing(), github(host))
    assert host.written()[0] == comment(failing())


def test_a_recipe_with_mistakes_updates_the_comment_of_that_recipe(host: Host) -> None:
    post_to_github(passing(), github(host))
    post_to_github({"recipe": "sentiment", **recipe_error()}, github(host))
    assert len(host.comments) == 1
    assert "ERROR" in host.written()[0]


def test_a_note_of_gitlab(host: Host) -> None:
    host.me = {"id": 7}
    host.add(PERSON, f"forged\n{marker(passing())}")
    for _ in range(120):
        host.add(PERSON, "talk")
    post_to_gitlab(failing(), gitlab(host))
    post_to_gitlab(passing(), gitlab(host))
    assert host.written()[121:] == [comment(passing(), limit=1_000_000)]
    assert host.requests[-1] == ("PUT", "/projects/42/merge_requests/3/notes/122")
    assert host.tokens == {TOKEN}


def test_the_pull_request_of_a_finished_workflow_is_the_event_s_not_the_artifact_s(host: Host, tmp_path: Path) -> None:
    finished = {"head_sha": "abc", "head_branch": "fix", "head_repository": {"owner": {"login": "fork"}}}
    (event := tmp_path / "event.json").write_text(json.dumps({"workflow_run": finished}))
    env = github(host, GITHUB_EVENT_PATH=str(event), GITHUB_REF="refs/heads/main")
    host.pulls = [
        {"of": "fork:fix", "number": 4, "head": {"sha": "old"}},
        {"of": "other:fix", "number": 5, "head": {"sha": "abc"}},
    ]
    with pytest.raises(PostingError, match="no open pull request"):
        post_to_github(passing(), env)
    host.pulls.append({"of": "fork:fix", "number": 6, "head": {"sha": "abc"}})
    post_to_github(passing(), env)
    assert host.requests[-1] == ("POST", "/repos/o/r/issues/6/comments")
    with pytest.raises(PostingError, match="no open pull request"):
        post_to_github(passing(), env, number=5)


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_what_passes_by_itself_is_tried_again_without_a_second_comment(host: Host, status: int) -> None:
    def once_written_then_lost(method: str, path: str) -> int | None:
        if method == "POST" and not host.comments:
            host.add(BOT, f"x\n{marker(passing())}")
            return status
        return None

    host.trouble = once_written_then_lost
    post_to_github(passing(), github(host))
    assert host.written() == [comment(passing())]


@pytest.mark.parametrize("status", [500, 403, 401, 404, 302, 0])
def test_a_failure_is_told_without_the_token_and_changes_nothing(
    host: Host, status: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(posting, "TIMEOUT_SECONDS", 0.3)
    host.trouble = lambda method, path: None if path == "/user" else status
    for name, value in {**github(host), **gitlab(host)}.items():
        monkeypatch.setenv(name, value)
    host.me = {"login": "x", "id": 7}
    write_reports(passing(), None, ["github-comment", "gitlab-comment"])
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("warning: ") == 2
    assert TOKEN not in said.err
    assert {403: "forks", 401: "forks", 302: "moved", 0: "in time"}.get(status, f"HTTP {status}") in said.err
    assert ("GET", "/elsewhere") not in host.requests
    assert len(host.requests) == (6 + 6 if status in (500, 0) else 2 + 2)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"GITHUB_API_URL": "http://example.com"}, "not https"),
        ({"GITHUB_API_URL": "file:///etc"}, "not https"),
        ({"GITHUB_TOKEN": ""}, "GITHUB_TOKEN is not set"),
        ({"GITHUB_TOKEN": f"{TOKEN}\r\nX-Evil: 1"}, "is no token"),
        ({"GITHUB_REPOSITORY": "o/r/../../x"}, "OWNER/NAME"),
        ({"GITHUB_REF": "refs/heads/main"}, "belongs to no pull request"),
    ],
)
def test_nothing_is_sent_where_it_should_not_go(host: Host, changed: dict[str, str], said: str) -> None:
    with pytest.raises(PostingError, match=said) as raised:
        post_to_github(passing(), github(host, **changed))
    assert TOKEN not in str(raised.value)
    assert not host.requests
    assert urlsplit(host.url).hostname == "127.0.0.1"
