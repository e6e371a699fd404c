"""Losses of checkpoints as vLLM serves them, from its paged cache of latents."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..accuracy import evaluate
from ..accuracy import make as make_checkpoint
from .catalog import Row

#: Of ``recalkv eval``. It runs vLLM in float32, so that rounding of activations is no part of it.
ENGINE = ("--engine", "vllm")


def add_served(
    result: dict[str, Any],
    rows: Sequence[Row],
    options: argparse.Namespace,
    write: Callable[[], None],
) -> None:
    """Add ``served_loss``, against the dense model in vLLM, to the checkpoints among ``rows``.

    Peers and latents in codes have no cache that vLLM could serve from here, and get none.

    Args:
        result: with the losses of all ``rows`` in ``transformers``.
        options: of the command line.
        write: keeps what there is, after each row.

    Raises:
        subprocess.CalledProcessError: a checkpoint could not be made or evaluated.
    """
    entries = {entry["name"]: entry for entry in result["rows"]}
    for row in rows:
        entry = entries[row.name]
        if row.checkpoint is None or row.latent_bits is not None or "served_loss" in entry:
            continue
        if "served_nll" not in result["dense"]:
            print("peers: the dense model, served", file=sys.stderr)
            result["dense"]["served_nll"] = evaluate(options.model, options, *ENGINE)["nll"]
            write()
        print(f"peers: {row.name}, served", file=sys.stderr)
        make_checkpoint(row.checkpoint, options)  # it may have been removed to save space
        nll = evaluate(options.out / row.checkpoint.name, options, *ENGINE)["nll"]
        entry["served_loss"] = nll - result["dense"]["served_nll"]
        write()
