"""Secrets stay out of what is written: refused in settings, struck out of command lines and messages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

USERINFO = re.compile(r"(?<=://)[^/\s@]+(?=@)")
TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|sk-[\w-]{16,}|AKIA[A-Z0-9]{16})"
)
SECRET_NAME = re.compile(r"(?:TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY)$", re.IGNORECASE)
SHORTEST = 8  # characters; a shorter value of the environment could be any word
STRUCK = "***"


def secret_in(text: str) -> str | None:
    """What kind of secret stands in `text`, in words that do not repeat it; None if there is none."""
    if USERINFO.search(text):
        return "a user name or password in an address"
    if TOKEN.search(text):
        return "what looks like an access token"
    return next((f"the value of ${name}" for name, value in _environment() if value in text), None)


def redact(text: str) -> str:
    """`text` with everything struck out that `secret_in` recognises."""
    text = TOKEN.sub(STRUCK, USERINFO.sub(STRUCK, text))
    for _, value in _environment():
        text = text.replace(value, STRUCK)
    return text


def _environment() -> Iterator[tuple[str, str]]:
    """Names and values of the environment that are secret by their names."""
    return ((name, value) for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST)
