"""The text of `describe`, read by programs."""

from __future__ import annotations

import re


def read(text: str) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Return the lines of a text by their names, as number and words, and the advice."""
    assert max(map(len, text.splitlines())) < 110
    body, _, advice = text.partition("\nAdvice")
    lines: dict[str, tuple[str, str]] = {}
    name = ""
    for line in body.splitlines()[1:]:
        if line.startswith(" " * 20):
            lines[name] = (lines[name][0], f"{lines[name][1]} {line.strip()}")
        elif line.startswith(" " * 10):
            name = f"{name}'"
            lines[name] = tuple(line.split(maxsplit=1))
        elif line.startswith("  "):
            name, figure, words = re.match(r"  (.{13}) (.*?)  +(.*)", line).groups()
            name = name.strip()
            lines[name] = (figure, words)
        else:
            lines[line.split(":")[0]] = ("", line.partition(": ")[2])
    return lines, re.sub(r"\n    ", " ", advice).replace("  * ", "").splitlines()[1:]
