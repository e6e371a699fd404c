"""The tables of architectures on the page ``docs/supported_models.md``.

Rewrite them with ``python -m tests.supported_models``; a test compares them.
"""

from __future__ import annotations

from pathlib import Path

from recalkv_vllm.architectures import SUPPORTED
from recalkv_vllm.refused_architectures import REASONS

PAGE = Path(__file__).parents[1] / "docs" / "supported_models.md"
SERVED_HEADER = (
    "| `model_type` | Served as | vLLM's class | Examples |\n| --- | --- | --- | --- |\n"
)
REFUSED_HEADER = "| `model_type` | Refused for |\n| --- | --- |\n"


def served_table() -> str:
    """Of all supported architectures."""
    rows = (
        f"| `{model_type}` | `{architecture.served_name}` "
        f"| `{architecture.vllm_class.partition(':')[2]}` | {architecture.examples} |\n"
        for model_type, architecture in SUPPORTED.items()
    )
    return SERVED_HEADER + "".join(rows)


def refused_table() -> str:
    """Of all that are refused by a reason of their own."""
    rows = (
        f"| {', '.join(f'`{model_type}`' for model_type in model_types)} | {reason} |\n"
        for reason, model_types in REASONS.items()
    )
    return REFUSED_HEADER + "".join(rows)


def page() -> str:
    """The page with its tables brought up to date; the text around them as it is."""
    text = PAGE.read_text(encoding="utf-8")
    for header, table in ((SERVED_HEADER, served_table()), (REFUSED_HEADER, refused_table())):
        before, _, after = text.partition(header)
        _, blank, after = after.partition("\n\n")
        text = before + table + blank[1:] + after
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
