"""Results in words, and in a checkpoint's model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recalkv_vllm.compression.errors import InputError

CARD = "README.md"
HEADING = "## Measured\n\n"
#: Heading of the card before which the results stand.
NEXT = "## How it was made\n"


def by_dataset(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The results on each of several datasets; or the one result."""
    return [{**result, **each} for each in result.get("datasets", [{}])]


def describe_result(result: dict[str, Any]) -> tuple[str, str]:
    """What was measured, on what and with which engine; and what was found."""
    engine = result["engine"]
    match result["metric"]:
        case "ppl":
            base = ""
            if "base_nll" in result:
                base = f"; base {result['base_perplexity']:.4f}, loss {result['loss']:+.5f}"
            return (
                f"perplexity ({_text(result)}, {engine})",
                f"{result['perplexity']:.4f} (nll {result['nll']:.5f}{base})",
            )
        case "agreement":
            return (
                f"agreement with {Path(result['base']).name} ({_text(result)}, {engine})",
                f"the same most likely token at {result['top1']:.2%}; KL divergence "
                f"{result['kl']:.5f}; nll {result['nll']:.5f} against {result['base_nll']:.5f}",
            )
        case "divergence":
            return (
                f"greedy answers as {Path(result['base']).name} gives them ({engine})",
                f"{result['same']:.1%} of {result['answers']} to the end; the first difference "
                f"after {result['median_tokens']:.0f} tokens in the median",
            )
        case "passkey" | "ruler" as metric:
            lengths = ", ".join(map(str, sorted({row["length"] for row in result["rows"]})))
            name = "pass keys" if metric == "passkey" else "RULER"
            base = f" (base: {result['base_score']:.1%})" if "base_score" in result else ""
            return (
                f"{name} ({lengths} tokens, {engine})",
                f"{result['score']:.1%}{base} found, {result['prompts']} prompts",
            )
    raise ValueError(f"metric: expected a known one, found {result['metric']!r}")


def add_to_card(directory: Path, result: dict[str, Any]) -> None:
    """Add a result to a checkpoint's model card, in the place of an earlier one of the same kind.

    Raises:
        InputError: no model card that ``recalkv compress`` wrote.
    """
    head, tail = read_card(directory).split(NEXT, 1)
    head, _, listed = head.partition(HEADING)
    what, found = describe_result(result)
    kept = [line for line in listed.splitlines() if line and not line.startswith(f"- {what}: ")]
    lines = "\n".join([*kept, f"- {what}: {found}"])
    (directory / CARD).write_text(f"{head}{HEADING}{lines}\n\n{NEXT}{tail}", encoding="utf-8")


def card_results(directory: Path) -> list[str]:
    """Results that a checkpoint's model card lists; none if it has no such card."""
    path = directory / CARD
    card = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    listed = card.partition(NEXT)[0].partition(HEADING)[2]
    return [line.removeprefix("- ") for line in listed.splitlines() if line.startswith("- ")]


def read_card(directory: Path) -> str:
    """The model card. Raises :class:`InputError` unless ``recalkv compress`` wrote it."""
    path = directory / CARD
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    if NEXT not in card:
        raise InputError(f"{path}: expected the model card of a compressed checkpoint")
    return card


def _text(result: dict[str, Any]) -> str:
    return f"{result['tokens']} tokens of {result['dataset']}, windows of {result['seq_len']}"
