"""No password or token of an address in a message."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimize.masking import holds_secret, masked

TOKEN = "t0ken-t0ken-t0ken-t0ken"


@pytest.mark.parametrize(
    ("address", "secret"),
    [
        ("https://ada:s3cret@host:5000/path", "s3cret"),
        ("https://ada:s%2Fcret@host/path", "s/cret"),
        (f"https://{TOKEN}@host/", TOKEN),
        ("postgresql://host/runs?user=ada&password=s3cret", "s3cret"),
        (f"https://host/?access_token={TOKEN}&page=2", TOKEN),
        ("s3://bucket/?X-Amz-Signature=abcdef0123", "abcdef0123"),
    ],
)
def test_a_secret_is_known_and_hidden(address: str, secret: str) -> None:
    assert holds_secret(address)
    assert secret not in masked(f"can't reach {address}")
    taken_apart = f"login as ada with {secret} refused"
    assert secret not in masked(taken_apart, address)
    assert "refused" in masked(taken_apart, address)


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:5000", "sqlite:////tmp/x@y/a.db", "postgresql://ada@host/runs", "https://host/a?page=2", "runs"],
)
def test_what_holds_none(address: str) -> None:
    assert not holds_secret(address)


letters = st.text("abcdefgXYZ019._~!$'()*+,;=%-", min_size=3, max_size=40)


@settings(deadline=None)
@given(letters.filter(lambda text: "***" not in text), st.text(max_size=20))
def test_whatever_the_password(password: str, before: str) -> None:
    address = f"https://ada:{password}@host/path"
    shown = masked(f"{before} {address} {password}", address)
    assert f":{password}@" not in shown
    assert not shown.endswith(password)
