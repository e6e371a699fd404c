"""Messages on the troubleshooting page are those of the sources."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "operations" / "troubleshooting.md"
MESSAGES = re.findall(r"^\| `(.*?)` \|", PAGE.read_text(), re.MULTILINE)


def sources() -> list[Path]:
    return [*(ROOT / "recalkv_vllm").rglob("*.py"), ROOT / "setup.py", ROOT / "cuda_build.py"]


@cache
def texts() -> list[str]:
    """Every string of the sources; a gap where a value goes."""
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", "") for part in node.values]
                found.append("…".join(part for part in parts if isinstance(part, str)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_there_are_some():
    assert len(MESSAGES) > 25


@pytest.mark.parametrize("message", MESSAGES)
def test_message_is_in_the_sources(message):
    parts = (part.strip(" ,;:()") for part in message.split("…"))
    pattern = re.compile(".*?".join(map(re.escape, parts)), re.DOTALL)
    assert any(pattern.search(text) for text in texts())
