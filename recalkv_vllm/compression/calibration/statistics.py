"""Calibration statistics of a model: cached on disk by content, read one layer at a time."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from recalkv_vllm.cache_directory import cache_directory
from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.base_model.attention import CausalLM
from recalkv_vllm.compression.calibration.calibration_pass import run_pass, sum_shapes
from recalkv_vllm.compression.calibration.kronecker import KroneckerFactors, mean_factors
from recalkv_vllm.compression.calibration.observers import FisherDiagonal, InputMoments, Observer
from recalkv_vllm.compression.calibration.sum_store import SumStore, is_complete, read_complete
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.layer import FisherFactors, InputStatistics

log = logging.getLogger(__name__)

#: Part of every cache key: raise it when an observer sums something else under the same name.
STATISTICS_VERSION = 5

#: Observers by the name that methods ask for.
OBSERVERS: dict[str, type[Observer]] = {
    "moments": InputMoments,
    "fisher": FisherDiagonal,
    "kronecker": KroneckerFactors,
}


class Statistics:
    """Finished statistics; a layer is read from disk when asked for."""

    def __init__(self, directory: Path):
        self._sums, self._counts = read_complete(directory)
        for name, array in self._sums.items():
            for layer, part in enumerate(array):
                if not np.isfinite(part).all():
                    raise InputError(
                        f"calibration statistics: {name} of layer {layer} is not finite; the model "
                        "overflows in this precision (try --device cpu or another --dtype)"
                    )

    def inputs(self, layer: int) -> InputStatistics | None:
        """Input moments of a layer, if there (observer ``moments``)."""
        if "input_outer" not in self._sums:
            return None
        return InputStatistics(
            second_moment=self._mean("input_outer", layer), mean=self._mean("input", layer)
        )

    def kronecker(self, layer: int) -> FisherFactors | None:
        """Kronecker factors of a layer, if there (observer ``kronecker``)."""
        if "kronecker_input" not in self._sums:
            return None
        outer_x, outer_g, weight = (
            torch.tensor(self._sums[name][layer], dtype=torch.float64)
            for name in KroneckerFactors.SUMS
        )
        return FisherFactors(*mean_factors(outer_x, outer_g, weight, self._counts["tokens"]))

    def _mean(self, name: str, layer: int) -> torch.Tensor:
        """Mean over tokens, float64."""
        total = self._sums[name][layer].astype(np.float64)
        return torch.from_numpy(total) / self._counts["tokens"]

    def fisher(self, layer: int) -> np.ndarray:
        """Diagonal Fisher information ``[2, h_kv · d, H]`` of a layer's key and value projection
        (observer ``fisher``)."""
        return self._sums["fisher"][layer].astype(np.float64) / self._counts["samples"]


def samples_digest(samples: torch.Tensor) -> str:
    """Digest of calibration samples (hex)."""
    shaped = f"{tuple(samples.shape)}".encode() + samples.numpy().tobytes()
    return hashlib.blake2b(shaped, digest_size=16).hexdigest()


def collect(
    names: Iterable[str],
    samples: torch.Tensor,
    geometry: AttentionGeometry,
    key: str,
    load_model: Callable[[], CausalLM],
) -> Statistics:
    """Statistics of the named observers, from the cache or by a pass over ``samples``.

    Args:
        names: keys of :data:`OBSERVERS`.
        samples: ``[samples, seq_len]`` token ids.
        geometry: of the model.
        key: identifies model, samples and arithmetic.
        load_model: called only if a pass is needed.

    Raises:
        InputError: the statistics are not finite.
    """
    wanted = set(names)
    root = cache_directory() / f"statistics-{STATISTICS_VERSION}" / key
    for directory in sorted(root.glob("*")):
        if wanted <= set(directory.name.split("+")) and is_complete(directory):
            log.info("calibration statistics: reusing %s", directory)
            return Statistics(directory)
    directory = root / "+".join(sorted(wanted))
    observers = [OBSERVERS[name]() for name in sorted(wanted)]
    with SumStore(directory, sum_shapes(observers, geometry)) as store:
        # Another process may have finished the pass while this one waited for the store.
        if not is_complete(directory):
            if store.samples_done:
                log.info(
                    "calibration statistics: resuming after %d of %d samples",
                    store.samples_done,
                    len(samples),
                )
            run_pass(load_model(), samples, observers, store)
    return Statistics(directory)
