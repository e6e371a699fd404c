"""How many tokens a model's positions reach."""

from __future__ import annotations

from typing import Any

#: Kinds of RoPE scaling that reach ``factor`` times as far as ``max_position_embeddings`` says.
STRETCHED = {"linear", "dynamic", "yarn"}


def longest_context(config: dict[str, Any]) -> int | None:
    """The most tokens of a sequence by a model's ``config.json``, as vLLM derives it; None if the
    configuration does not say."""
    longest = config.get("max_position_embeddings")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if longest is None or rope.get("rope_type", rope.get("type")) not in STRETCHED:
        return longest
    return int(rope.get("original_max_position_embeddings", longest) * rope.get("factor", 1))
