"""Scores of one or two models over tasks, lengths and depths."""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.evaluation.engines import Engine
from recalkv_vllm.evaluation.ruler.answers import AnswerFile
from recalkv_vllm.evaluation.ruler.prompt import Cell, Prompt, fit_prompt
from recalkv_vllm.evaluation.ruler.tasks import find_task

log = logging.getLogger(__name__)

#: A base model that scores less has too little to retain: no share is taken of it.
LEAST_BASE_SCORE = 0.5


@dataclass(frozen=True, slots=True)
class Grid:
    """What is asked: ``samples`` prompts for every task, length and depth.

    Args:
        tasks: names.
        lengths: of prompt and answer together, in tokens.
        depths: of the needle, from 0 to 1.
        samples: prompts each.
        seed: of everything random.
    """

    tasks: Sequence[str]
    lengths: Sequence[int]
    depths: Sequence[float]
    samples: int
    seed: int

    def check(self, longest: int | None) -> None:
        """Raise :class:`InputError` for an unknown task, a depth out of range, or a length above
        ``longest``, the model's own."""
        for task in self.tasks:
            find_task(task)
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise InputError(f"--depths {depth}: expected a number from 0 to 1")
        for length in self.lengths:
            if longest is not None and length > longest:
                raise InputError(f"--lengths {length}: expected at most {longest} for this model")

    def cells(self) -> list[Cell]:
        """One for each prompt, in order."""
        kinds = itertools.product(self.tasks, self.lengths, self.depths, range(self.samples))
        return [Cell(*kind, self.seed) for kind in kinds]


def score_model(
    engine: Engine, model: Path, tokenizer, prompts: dict[Cell, Prompt], answers: AnswerFile
) -> dict[Cell, float]:
    """A model's score for every prompt.

    Args:
        engine: that runs it.
        model: its directory.
        tokenizer: that decodes its answers.
        prompts: to answer.
        answers: those known already; new ones are added as they come.
    """
    known = {
        cell: answers.find(prompt.ids, prompt.answer_tokens) for cell, prompt in prompts.items()
    }
    missing = {cell: prompts[cell] for cell, answer in known.items() if answer is None}
    if missing and len(missing) < len(known):
        log.info("%s: %d of %d answers are known", model, len(known) - len(missing), len(known))
    if missing:
        ids = [prompt.ids for prompt in missing.values()]
        limits = [prompt.answer_tokens for prompt in missing.values()]
        generated = engine.generate(model, ids, limits)
        for (cell, prompt), tokens in zip(missing.items(), generated, strict=True):
            answer = tokenizer.decode(tokens, skip_special_tokens=True)
            about = {
                "task": cell.task,
                "length": cell.length,
                "depth": cell.depth,
                "references": prompt.references,
                "score": prompt.score(answer),
            }
            answers.add(prompt.ids, prompt.answer_tokens, answer, **about)
            known[cell] = answer
    return {cell: prompts[cell].score(answer or "") for cell, answer in known.items()}


def make_prompts(grid: Grid, tokenizer) -> dict[Cell, Prompt]:
    """All prompts of a grid. Raises :class:`InputError` if a length is too short for a task."""
    return {cell: fit_prompt(find_task(cell.task), cell, tokenizer) for cell in grid.cells()}


def summarize(scores: dict[str, dict[Cell, float]]) -> dict[str, Any]:
    """Mean scores by task and length, and by depth where a task has one.

    Args:
        scores: of every prompt, under ``score`` and, with a base model, ``base_score``.

    Returns:
        ``score`` (and ``base_score``) over all; ``prompts``; ``rows`` by task and length, with
        ``retained``, the share of the base model's score, or None where that is below
        :data:`LEAST_BASE_SCORE`, and ``retained_error``, its standard error, or None with one
        prompt; ``retained`` and its error, over all rows with a share; ``cells`` by task, length
        and depth.
    """
    cells = list(scores["score"])

    def means(chosen: list[Cell]) -> dict[str, float]:
        return {name: sum(of[cell] for cell in chosen) / len(chosen) for name, of in scores.items()}

    def retained(chosen: list[Cell]) -> dict[str, float | None]:
        ours, base = ([scores[name][cell] for cell in chosen] for name in ("score", "base_score"))
        return _retained(ours, base)

    rows: list[dict[str, Any]] = []
    shared: list[Cell] = []
    for (task, length), group in _grouped(cells, lambda cell: (cell.task, cell.length)).items():
        row: dict[str, Any] = {"task": task, "length": length, **means(group)}
        if "base_score" in row:
            row |= retained(group)
            if row["retained"] is not None:
                shared += group
        rows.append({**row, "prompts": len(group)})
    at_depth = [cell for cell in cells if find_task(cell.task).at_depth]
    by_depth = _grouped(at_depth, lambda cell: (cell.task, cell.length, cell.depth))
    return {
        **means(cells),
        "prompts": len(cells),
        **(retained(shared) if shared else {}),
        "rows": rows,
        "cells": [
            {"task": task, "length": length, "depth": depth, **means(group)}
            for (task, length, depth), group in by_depth.items()
        ],
    }


def _retained(ours: list[float], base: list[float]) -> dict[str, float | None]:
    """The share of the base model's score on the same prompts, and its standard error."""
    mean = statistics.fmean(base)
    if mean < LEAST_BASE_SCORE:
        return {"retained": None, "retained_error": None}
    share = statistics.fmean(ours) / mean
    error = None
    if len(ours) > 1:
        # Of a ratio of means over pairs.
        residuals = [a - share * b for a, b in zip(ours, base, strict=True)]
        error = statistics.stdev(residuals) / len(residuals) ** 0.5 / mean
    return {"retained": share, "retained_error": error}


def _grouped(cells: list[Cell], key) -> dict[Any, list[Cell]]:
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return groups
