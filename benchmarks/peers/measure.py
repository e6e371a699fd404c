"""Loss of one row: of a peer inside attention, or of a checkpoint that is made for it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.base_model.attention import CausalLM
from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.calibration.samples import draw_samples
from recalkv_vllm.compression.calibration.text import documents
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.progress import track
from recalkv_vllm.evaluation.perplexity import cut_windows, describe_losses
from recalkv_vllm.evaluation.transformers_engine import load_served, score

from ..accuracy import make as make_checkpoint
from ..accuracy import measure as measure_checkpoint
from .attention import observed_attention, peer_attention
from .catalog import Row
from .latents import code_latents
from .peer import HALF, Peer

#: Draws the calibration samples; that of ``recalkv compress``.
SEED = 42


class Bench:
    """The model and both texts, each read when a row first needs it.

    Args:
        options: of the command line.
        rows: that will be measured.

    Raises:
        InputError: more tokens at once than the model's context, or a geometry that a peer cannot
            round.
    """

    def __init__(self, options: argparse.Namespace, rows: Sequence[Row]):
        self.options = options
        base = BaseModel(Path(options.model))
        self.geometry: AttentionGeometry = base.geometry
        longest = base.config.get("max_position_embeddings", options.evaluate_len)
        for name in ("evaluate_len", "calibrate_len"):
            if getattr(options, name) > longest:
                flag = "--" + name.replace("_", "-")
                raise InputError(
                    f"{flag} {getattr(options, name)}: the model's context is {longest} tokens"
                )
        self.peers = {row.name: row.make(self.geometry) for row in rows if row.make is not None}
        self._calibrated = False
        self.tokenizer = base.tokenizer()
        self._network: CausalLM | None = None

    @property
    def network(self) -> CausalLM:
        if self._network is None:
            self._network = load_served(Path(self.options.model))
        return self._network

    def windows(self) -> list[list[int]]:
        """Windows of the evaluation text. Raises :class:`InputError` if there is not one."""
        options = self.options
        text = documents(options.evaluate)
        return cut_windows(text, self.tokenizer, options.evaluate_len, options.max_tokens)

    def dense_bytes(self) -> int:
        """Bytes of a token of the dense cache, in 16 bits."""
        return HALF * self.geometry.dense_width * self.geometry.num_layers

    def dense(self) -> dict[str, Any]:
        """The dense model's own score."""
        losses = score(self.network, self.windows())
        return kept(describe_losses(f"model {self.options.model}", losses))

    def row(self, row: Row) -> dict[str, Any]:
        """Measure a row. Raises :class:`InputError` for likelihoods that are not finite."""
        if row.latent_bits is not None:
            found, size = self._codes(row, row.latent_bits)
            long_context = size
        elif row.checkpoint is not None:
            self._network = None  # another process loads the model
            made = measure_checkpoint(row.checkpoint, self.options)
            size = made["kv_bytes_per_token"]["compressed"]
            found = kept(made)
            long_context = size
        else:
            peer = self.peers[row.name]
            peer.attach(self.network)
            if peer.calibrated and not self._calibrated:
                self.calibrate([peer for peer in self.peers.values() if peer.calibrated])
                self._calibrated = True
            losses = peer_losses(self.network, peer, self.windows())
            found = kept(describe_losses(f"peer {row.name}", losses))
            size = peer.bytes_per_token(self.options.evaluate_len)
            long_context = peer.bytes_per_token(10**9)
        return {"bytes_per_token": size, "long_context_bytes_per_token": long_context, **found}

    def _codes(self, row: Row, bits: int) -> tuple[dict[str, Any], float]:
        """A checkpoint's score with its latents in codes, and the bytes of a token."""
        assert row.checkpoint is not None
        self._network = None  # one model at a time
        make_checkpoint(row.checkpoint, self.options)
        directory = self.options.out / row.checkpoint.name
        network = load_served(directory)
        size = code_latents(network, directory, bits)
        losses = score(network, self.windows())
        return kept(describe_losses(f"peer {row.name}", losses)), size

    @torch.inference_mode()
    def calibrate(self, peers: Sequence[Peer]) -> None:
        """Let peers see the calibration text, all at once: the model runs over it once."""
        options = self.options
        samples = draw_samples(
            documents(options.calibrate),
            self.tokenizer,
            options.num_samples,
            options.calibrate_len,
            SEED,
        )
        for peer in peers:
            peer.attach(self.network)
        with observed_attention(self.network, peers):
            for sample in track(samples, "calibrating", total=len(samples)):
                self.network.model(sample[None].to(self.network.device), use_cache=False)
        for peer in peers:
            peer.fit()


def kept(found: dict[str, Any]) -> dict[str, Any]:
    """What a row keeps of an evaluation."""
    return {name: found[name] for name in ("nll", "perplexity", "tokens", "windows")}


def peer_losses(network: CausalLM, peer: Peer, windows: list[list[int]]) -> list[list[float]]:
    """As :func:`recalkv_vllm.evaluation.transformers_engine.score`, over the peer's cache."""
    with peer_attention(network, peer):
        return score(network, windows)
