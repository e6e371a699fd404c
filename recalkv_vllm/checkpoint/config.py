"""The ``recalkv`` object of ``config.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recalkv_vllm.band_format import CacheFormat, stored_format
from recalkv_vllm.checkpoint.errors import CheckpointError, brief, check_keys, is_int, require
from recalkv_vllm.checkpoint.files import CONFIG_FILE
from recalkv_vllm.checkpoint.geometry import AttentionGeometry
from recalkv_vllm.checkpoint.layout import LatentLayout
from recalkv_vllm.latent_format import LatentFormat

#: Version of what is written: the first that has all that is in it.
FORMAT_VERSION = 1
BANDS_VERSION = 2
#: Types of what is recorded and never interpreted.
_PROVENANCE = {"method": str, "settings": dict, "calibration": dict, "tool_versions": dict}


@dataclass(frozen=True, slots=True)
class RecalkvConfig:
    """The ``recalkv`` object of ``config.json``.

    ``compression`` is the requested fraction of KV-cache elements removed; what was reached follows
    from ``layers``. ``settings`` and ``calibration`` are provenance: recorded, never interpreted.
    ``factors_sha256`` is the digest of ``recalkv.safetensors``, in hex; it may be left out.
    """

    method: str
    compression: float
    layers: tuple[LatentLayout, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    latent_quantization: LatentFormat | None = None
    tool_versions: dict[str, str] = field(default_factory=dict)
    format_version: int = field(init=False)
    factors_sha256: str | None = None

    def __post_init__(self) -> None:
        in_bands = any(layer.bands is not None for layer in self.layers)
        version = BANDS_VERSION if in_bands else FORMAT_VERSION
        object.__setattr__(self, "format_version", version)

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], where: str = CONFIG_FILE) -> RecalkvConfig:
        """Parse and validate the ``recalkv`` object of a Hugging Face config dictionary.

        Raises:
            CheckpointError: naming the field, what was expected and what was found.
        """
        raw = config.get("recalkv")
        where = f"{where}: recalkv"
        require(isinstance(raw, Mapping), f"{where}: expected an object, found {brief(raw)}")
        assert raw is not None
        version = raw.get("format_version")
        require(
            is_int(version) and version in (FORMAT_VERSION, BANDS_VERSION),
            f"{where}.format_version: expected {FORMAT_VERSION} or {BANDS_VERSION}, "
            f"found {brief(version)}",
        )
        check_keys(cls, {"factors_sha256": None, **raw}, where)
        for name, kind in _PROVENANCE.items():
            require(
                isinstance(raw[name], kind),
                f"{where}.{name}: expected {kind.__name__}, found {brief(raw[name])}",
            )
        require(
            isinstance(raw["compression"], int | float)
            and not isinstance(raw["compression"], bool)
            and 0 <= raw["compression"] < 1,
            f"{where}.compression: expected a number in [0, 1), found {brief(raw['compression'])}",
        )
        digest = raw.get("factors_sha256", "0" * 64)
        require(
            isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None,
            f"{where}.factors_sha256: expected 64 hexadecimal digits, found {brief(digest)}",
        )
        quantization = raw["latent_quantization"]
        if quantization is not None:
            require(
                isinstance(quantization, Mapping),
                f"{where}.latent_quantization: expected null or an object, "
                f"found {brief(quantization)}",
            )
            try:
                quantization = LatentFormat.from_dict(quantization)
            except ValueError as error:
                raise CheckpointError(f"{where}.latent_quantization: {error}") from error
        geometry = AttentionGeometry.from_hf_config(config)
        layers = raw["layers"]
        found = len(layers) if isinstance(layers, list) else layers
        require(
            found == geometry.num_layers,
            f"{where}.layers: expected {geometry.num_layers} entries, found {brief(found)}",
        )
        parsed = []
        for i, layer in enumerate(layers):
            layout = LatentLayout.from_dict(layer, f"{where}.layers[{i}]")
            layout.validate(geometry, f"{where}.layers[{i}]")
            require(
                (layout.bands is not None) == (version == BANDS_VERSION),
                f"{where}.layers[{i}].bands: expected {'some' if layout.bands is None else 'none'} "
                f"in format_version {version}, found {brief(layout.bands)}",
            )
            parsed.append(layout)
        require(
            quantization is None or version == FORMAT_VERSION,
            f"{where}.latent_quantization: expected null in format_version {version}, found "
            f"{brief(raw['latent_quantization'])}",
        )
        known = {key: value for key, value in raw.items() if key != "format_version"}
        return cls(**{**known, "layers": tuple(parsed), "latent_quantization": quantization})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; :meth:`from_hf_config` reads it back."""
        raw = {**asdict(self), "layers": [layer.to_dict() for layer in self.layers]}
        raw = json.loads(json.dumps(raw))
        if self.factors_sha256 is None:
            del raw["factors_sha256"]
        return raw

    def latent_format(self, layer: int) -> CacheFormat | None:
        """How a layer's latents are stored; None: as plain elements."""
        return stored_format(self.layers[layer].bands, self.latent_quantization)

    @property
    def latent_dtype(self) -> str | None:
        """Name of all layers' way to store latents; None: that of plain elements."""
        latent_format = self.latent_format(0)
        return None if latent_format is None else latent_format.dtype

    def cached_elements_per_token(self) -> int:
        """Elements the compressed cache holds per token, over all layers."""
        return sum(layer.rank for layer in self.layers)


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """Read ``config.json``. Raises :class:`CheckpointError` when absent or not JSON."""
    path = Path(directory) / CONFIG_FILE
    require(path.is_file(), f"{path}: no such file; expected a model directory")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    require(isinstance(config, dict), f"{path}: expected a JSON object")
    return config
