"""A comment on a pull request or merge request that is written once and then updated in place.

The comment is found by the marker in its last line, among those that the token's own account wrote, so that nobody can
have another's overwritten by quoting the marker. The token comes from the environment, goes over https alone (or to
loopback), to no address that a redirect names, and into no message.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from optimize.report.gitlab import note
from optimize.report.markdown import comment, marker

ATTEMPTS = 3
TIMEOUT_SECONDS = 20.0
PAGE = 100
MAX_PAGES = 100
MAX_BYTES = 32 << 20
"""Of one answer."""
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class PostingError(Exception):
    """A comment could not be written. The message holds no secret."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def post_to_github(document: Mapping[str, Any], env: Mapping[str, str] = os.environ, number: int | None = None) -> str:
    """Write or update the comment on a pull request; the address of it. Raises `PostingError`.

    Everything but `number` is GitHub's own environment: GITHUB_TOKEN (or GH_TOKEN), GITHUB_REPOSITORY, GITHUB_API_URL
    and the event. In a `workflow_run` job the pull request is the open one whose newest commit the finished job ran
    on, which the event says and the artifact of that job can't.
    """
    token = env.get("GITHUB_TOKEN") or env.get("GH_TOKEN") or ""
    repository = env.get("GITHUB_REPOSITORY", "")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII):
        raise PostingError("GITHUB_REPOSITORY is not OWNER/NAME")
    api = Api.open(
        env.get("GITHUB_API_URL") or "https://api.github.com",
        token,
        {
            "Authorization": f"Bearer {token}",
            "Accept": "application/vnd.github+json",
            "X-GitHub-Api-Version": "2022-11-28",
        },
        "GITHUB_TOKEN",
    )
    asked = _pull_request(api, repository, env, number)
    text = comment(document)

    def write() -> str:
        mine = _own_login(api)
        listing = f"/repos/{repository}/issues/{asked}/comments"
        for one in api.pages(listing):
            user = one.get("user") or {}
            # The token of a job may not ask who it is; its comments are a bot's.
            own = user.get("login") == mine if mine else user.get("type") == "Bot"
            if own and _is_marked(one.get("body"), document):
                done = api.call("PATCH", f"/repos/{repository}/issues/comments/{int(one['id'])}", {"body": text})
                return str(done.get("html_url", ""))
        return str(api.call("POST", listing, {"body": text}).get("html_url", ""))

    return _insist(write)


def post_to_gitlab(document: Mapping[str, Any], env: Mapping[str, str] = os.environ, number: int | None = None) -> str:
    """Write or update the note on a merge request; the address of the merge request. Raises `PostingError`.

    GITLAB_TOKEN is a project access token with the scope `api`; the rest is GitLab's own: CI_API_V4_URL, CI_PROJECT_ID,
    CI_MERGE_REQUEST_IID.
    """
    token = env.get("GITLAB_TOKEN", "")
    project = quote(env.get("CI_MERGE_REQUEST_PROJECT_ID") or env.get("CI_PROJECT_ID") or "", safe="")
    asked = number or _whole(env.get("CI_MERGE_REQUEST_IID"))
    if not project or not asked:
        raise PostingError("this is no pipeline of a merge request: CI_PROJECT_ID or CI_MERGE_REQUEST_IID is missing")
    api = Api.open(
        env.get("CI_API_V4_URL") or "https://gitlab.com/api/v4", token, {"PRIVATE-TOKEN": token}, "GITLAB_TOKEN"
    )
    text = note(document)
    notes = f"/projects/{project}/merge_requests/{asked}/notes"

    def write() -> str:
        mine = api.call("GET", "/user").get("id")
        for one in api.pages(notes):
            if (one.get("author") or {}).get("id") == mine and _is_marked(one.get("body"), document):
                api.call("PUT", f"{notes}/{int(one['id'])}", {"body": text})
                break
        else:
            api.call("POST", notes, {"body": text})
        return f"{env.get('CI_MERGE_REQUEST_PROJECT_URL', '')}/-/merge_requests/{asked}"

    return _insist(write)


# --- which pull request -----------------------------------------------------------------------------------------------


def _pull_request(api: Api, repository: str, env: Mapping[str, str], number: int | None) -> int:
    event = _event(env.get("GITHUB_EVENT_PATH"))
    if isinstance(finished := event.get("workflow_run"), dict):
        return _of_finished(api, repository, finished, number)
    found = number or _whole(event.get("number")) or _whole((event.get("pull_request") or {}).get("number"))
    if not found and (named := re.fullmatch(r"refs/pull/(\d{1,9})/\w+", env.get("GITHUB_REF", ""), re.ASCII)):
        found = int(named[1])
    if not found:
        raise PostingError("this job belongs to no pull request, and none was named with --number")
    return found


def _of_finished(api: Api, repository: str, finished: Mapping[str, Any], number: int | None) -> int:
    """The open pull request whose newest commit a finished workflow ran on."""
    head = str((finished.get("head_repository") or {}).get("owner", {}).get("login", ""))
    branch, commit = str(finished.get("head_branch", "")), str(finished.get("head_sha", ""))
    query = urlencode({"state": "open", "head": f"{head}:{branch}"})
    for one in api.pages(f"/repos/{repository}/pulls?{query}"):
        if commit and (one.get("head") or {}).get("sha") == commit and number in (None, one.get("number")):
            return int(one["number"])
    raise PostingError("no open pull request has the commit that was measured as its newest; nothing is posted")


def _event(path: str | None) -> dict[str, Any]:
    try:
        event = json.loads(Path(path).read_bytes()) if path else {}
    except (OSError, ValueError):
        return {}
    return event if isinstance(event, dict) else {}


def _whole(value: object) -> int | None:
    return int(str(value)) if re.fullmatch(r"[1-9]\d{0,8}", str(value), re.ASCII) else None


def _own_login(api: Api) -> str | None:
    try:
        return api.call("GET", "/user").get("login")
    except PostingError as error:
        if error.status in (401, 403, 404):
            return None
        raise


def _is_marked(body: object, document: Mapping[str, Any]) -> bool:
    lines = str(body or "").rstrip().splitlines()
    return bool(lines) and lines[-1].strip() == marker(document)


# --- the wire ---------------------------------------------------------------------------------------------------------


def _insist(write: Any) -> str:
    """Try again what may pass by itself. The search is part of it: an attempt without an answer may have written."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return str(write())
        except PostingError as error:
            passing = error.status is None or error.status == 429 or error.status >= 500
            if not passing or attempt == ATTEMPTS:
                raise
            time.sleep(2.0 ** (attempt - 1))
    raise AssertionError("unreachable")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """An address that the host names must not get the token."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


@dataclass(frozen=True)
class Api:
    """A REST interface under one address, with one account's token."""

    base: str
    headers: Mapping[str, str]
    opener: Any

    @staticmethod
    def open(base: str, token: str, headers: Mapping[str, str], variable: str) -> Api:
        """Raises `PostingError` for an address without TLS, or a token that is none."""
        parts = urlsplit(base)
        local = parts.hostname in _LOOPBACK
        if not (parts.hostname and (parts.scheme == "https" or (parts.scheme == "http" and local))):
            raise PostingError("the address of the host's interface is not https")
        if not re.fullmatch(r"[\x21-\x7e]+", token):
            raise PostingError(f"{variable} is not set, or is no token")
        proxies = [urllib.request.ProxyHandler({})] if local else []
        opener = urllib.request.build_opener(_NoRedirect, *proxies)
        return Api(base.rstrip("/"), {"User-Agent": "optimize", "Content-Type": "application/json", **headers}, opener)

    def pages(self, path: str) -> Iterator[dict[str, Any]]:
        """Every item of a list that comes in pages."""
        for page in range(1, MAX_PAGES + 1):
            found = self._answer("GET", f"{path}{'&' if '?' in path else '?'}per_page={PAGE}&page={page}")
            items = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
            yield from items
            if len(items) < PAGE:
                return

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        found = self._answer(method, path, body)
        return found if isinstance(found, dict) else {}

    def _answer(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        what = f"{method} {path.partition('?')[0]}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data=data, headers=dict(self.headers), method=method)
        try:
            with self.opener.open(request, timeout=TIMEOUT_SECONDS) as response:
                raw = response.read(MAX_BYTES)
        except urllib.error.HTTPError as error:
            error.close()
            raise PostingError(f"{what}: HTTP {error.code}{_meaning(error.code)}", error.code) from None
        # Messages of the libraries below may quote a header.
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise PostingError(
                f"{what}: {'no answer in time' if isinstance(reason, TimeoutError) else 'no answer'} "
                f"({type(reason).__name__})"
            ) from None
        try:
            return json.loads(raw) if raw else {}
        except ValueError:
            raise PostingError(f"{what}: the answer is no JSON") from None


def _meaning(status: int) -> str:
    if status in (401, 403):
        return (
            ": the token may not write here. Jobs for pull requests from forks get none that may; docs/ci.md has the"
            " workflow in two steps for them"
        )
    if status == 404:
        return ": there is no such pull request, or the token can't see it"
    return ": the host moved; name its new address" if 300 <= status < 400 else ""
