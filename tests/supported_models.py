"""The table of architectures on the page ``docs/supported_models.md``.

Rewrite it with ``python -m tests.supported_models``; a test compares it.
"""

from __future__ import annotations

from pathlib import Path

from recalkv_vllm.architectures import SUPPORTED

PAGE = Path(__file__).parents[1] / "docs" / "supported_models.md"
HEADER = "| `model_type` | Served as | Examples |\n| --- | --- | --- |\n"


def table() -> str:
    """Of all supported architectures."""
    rows = (
        f"| `{model_type}` | `{architecture.served_name}` | {architecture.examples} |\n"
        for model_type, architecture in SUPPORTED.items()
    )
    return HEADER + "".join(rows)


def page() -> str:
    """The page with its table brought up to date; the text around it as it is."""
    before, _, after = PAGE.read_text(encoding="utf-8").partition(HEADER)
    _, blank, after = after.partition("\n\n")
    return before + table() + blank[1:] + after


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
