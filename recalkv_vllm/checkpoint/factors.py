"""The factors' file, ``recalkv.safetensors``: written and strictly read; nothing is unpickled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from recalkv_vllm.checkpoint.config import RecalkvConfig
from recalkv_vllm.checkpoint.errors import CheckpointError, require
from recalkv_vllm.checkpoint.files import CONFIG_FILE
from recalkv_vllm.checkpoint.geometry import AttentionGeometry

FACTOR_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def factor_name(layer: int, factor: str) -> str:
    """Name of a factor tensor in ``recalkv.safetensors``."""
    return f"layers.{layer}.{factor}"


def save_factors(path: Path, factors: Mapping[str, torch.Tensor]) -> None:
    """Write ``recalkv.safetensors``; every tensor is made contiguous on the CPU."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in factors.items()}
    # A single entry: several are written in an order that differs from run to run.
    save_file(tensors, path, metadata={"format": "pt"})


def file_sha256(path: Path) -> str:
    """SHA-256 digest of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


class FactorReader:
    """Strict, lazy reader of ``recalkv.safetensors``.

    Opening checks names, dtypes and shapes of all tensors against the configuration from the file's
    header alone; :meth:`read` checks that values are finite. Use it as a context manager.

    Raises:
        CheckpointError: naming file, tensor, expected and found.
    """

    def __init__(self, path: str | Path, config: RecalkvConfig, geometry: AttentionGeometry):
        self.path = Path(path)
        self._config, self._geometry = config, geometry
        require(self.path.is_file(), f"{self.path}: no such file; expected the factors")
        try:
            self._file = safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.path}: not a readable safetensors file ({error})"
            ) from error
        expected = {
            factor_name(i, short): shape
            for i, layer in enumerate(config.layers)
            for short, shape in layer.factor_shapes(geometry).items()
        }
        found = set(self._file.keys())
        if missing := sorted(set(expected) - found):
            raise CheckpointError(f"{self.path}: tensor {_some(missing)} missing")
        if unknown := sorted(found - set(expected)):
            raise CheckpointError(f"{self.path}: unknown tensor {_some(unknown)}")
        dtypes = set()
        for name, shape in expected.items():
            tensor = self._file.get_slice(name)
            require(
                tuple(tensor.get_shape()) == shape,
                f"{self.path}: {name}: expected shape {list(shape)}, found {tensor.get_shape()}",
            )
            require(
                tensor.get_dtype() in FACTOR_DTYPES,
                f"{self.path}: {name}: expected dtype {' or '.join(FACTOR_DTYPES)}, "
                f"found {tensor.get_dtype()}",
            )
            dtypes.add(tensor.get_dtype())
        require(len(dtypes) == 1, f"{self.path}: expected one dtype, found {sorted(dtypes)}")
        self.dtype = FACTOR_DTYPES[dtypes.pop()]

    def __enter__(self) -> FactorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__(None, None, None)

    def check(self) -> None:
        """Read every factor once, then compare the file's digest with the one recorded, if any.

        Raises:
            CheckpointError: like :meth:`read`, or naming both digests.
        """
        for layer, layout in enumerate(self._config.layers):
            for factor in layout.factor_shapes(self._geometry):
                self.read(layer, factor)
        recorded = self._config.factors_sha256
        if recorded is not None:
            found = file_sha256(self.path)
            require(
                found == recorded,
                f"{self.path}: expected SHA-256 {recorded}, as {CONFIG_FILE} records, found "
                f"{found}: the file is not what was written",
            )

    def read(self, layer: int, factor: str) -> torch.Tensor:
        """Return one factor (shape of :meth:`LatentLayout.factor_shapes`), on the CPU."""
        name = factor_name(layer, factor)
        tensor = self._file.get_tensor(name)
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        require(
            bad == 0,
            f"{self.path}: {name}: expected finite values, "
            f"found {bad} of {tensor.numel()} not finite",
        )
        return tensor


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
