"""The compressed checkpoint: the only thing the offline tool and the server share.

A checkpoint is an ordinary Hugging Face directory whose ``config.json`` carries a ``recalkv``
object (:class:`RecalkvConfig`) and whose factors lie in ``recalkv.safetensors``. Readers validate
everything before a tensor is used; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from recalkv_vllm.latent_format import LatentFormat, token_bytes
from recalkv_vllm.span import Span

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
FACTORS_FILE = "recalkv.safetensors"
#: A model's weights: one file, or several with an index.
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: Latent spans start and end at multiples of this many numbers.
SPAN_MULTIPLE = 16
FACTOR_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

#: Types of what is recorded and never interpreted.
_PROVENANCE = {"method": str, "settings": dict, "calibration": dict, "tool_versions": dict}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names file, field, expected and found."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckpointError(message)


@dataclass(frozen=True, slots=True)
class AttentionGeometry:
    """Sizes of a decoder's attention, read from a Hugging Face config."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> AttentionGeometry:
        """Read the geometry out of a config dictionary (``config.json`` or ``to_dict()``)."""
        heads = _size(config, "num_attention_heads")
        hidden_size = _size(config, "hidden_size")
        return cls(
            num_layers=_size(config, "num_hidden_layers"),
            hidden_size=hidden_size,
            num_heads=heads,
            num_kv_heads=_size(config, "num_key_value_heads", heads),
            head_dim=_size(config, "head_dim", hidden_size // heads),
        )

    @property
    def dense_width(self) -> int:
        """Numbers that an uncompressed cache holds per token and layer."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class LatentLayout:
    """What one layer caches per token, and which part of it each head group reads.

    Args:
        rank: numbers cached per token.
        k_group_size: KV heads per K group (``s``).
        k_spans: ``[start, end)`` in the latent, one per K group; all equally wide.
        v_spans: the same, one per V group.
        head_order: ``head_order[i]`` is the base model's index of KV head ``i`` here.
    """

    rank: int
    k_group_size: int
    k_spans: tuple[Span, ...]
    v_spans: tuple[Span, ...]
    head_order: tuple[int, ...]

    def __post_init__(self) -> None:
        # Plain pairs will do.
        for name in ("k_spans", "v_spans"):
            spans = tuple(Span(*span) for span in getattr(self, name))
            object.__setattr__(self, name, spans)

    @property
    def k_width(self) -> int:
        return self.k_spans[0].width

    @property
    def v_width(self) -> int:
        return self.v_spans[0].width

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str) -> LatentLayout:
        _check_keys(cls, raw, where)
        _require(
            _is_int(raw["rank"]), f"{where}.rank: expected an integer, found {_brief(raw['rank'])}"
        )
        _require(
            _is_int(raw["k_group_size"]),
            f"{where}.k_group_size: expected an integer, found {_brief(raw['k_group_size'])}",
        )
        for name in ("k_spans", "v_spans"):
            spans = raw[name]
            _require(
                isinstance(spans, list)
                and bool(spans)
                and all(
                    isinstance(s, list) and len(s) == 2 and all(map(_is_int, s)) for s in spans
                ),
                f"{where}.{name}: expected a list of [start, end], found {_brief(spans)}",
            )
        order = raw["head_order"]
        _require(
            isinstance(order, list) and all(map(_is_int, order)),
            f"{where}.head_order: expected a list of integers, found {_brief(order)}",
        )
        return cls(
            rank=raw["rank"],
            k_group_size=raw["k_group_size"],
            k_spans=raw["k_spans"],
            v_spans=raw["v_spans"],
            head_order=tuple(order),
        )

    def validate(self, geometry: AttentionGeometry, where: str) -> None:
        """Raise :class:`CheckpointError` unless the layout fits ``geometry``."""
        heads = geometry.num_kv_heads
        _require(
            self.rank > 0 and self.rank % SPAN_MULTIPLE == 0,
            f"{where}.rank: expected a positive multiple of {SPAN_MULTIPLE}, found {self.rank}",
        )
        _require(
            self.k_group_size > 0 and heads % self.k_group_size == 0,
            f"{where}.k_group_size: expected a divisor of {heads} KV heads, "
            f"found {self.k_group_size}",
        )
        _require(
            len(self.k_spans) == heads // self.k_group_size,
            f"{where}.k_spans: expected {heads // self.k_group_size} spans "
            f"({heads} KV heads in groups of {self.k_group_size}), found {len(self.k_spans)}",
        )
        _require(
            heads % len(self.v_spans) == 0,
            f"{where}.v_spans: expected a number of spans that divides {heads} KV heads, "
            f"found {len(self.v_spans)}",
        )
        for name, spans in (("k_spans", self.k_spans), ("v_spans", self.v_spans)):
            width = spans[0].width
            for span in spans:
                start, end = span
                _require(
                    0 <= start < end <= self.rank
                    and start % SPAN_MULTIPLE == 0
                    and end % SPAN_MULTIPLE == 0,
                    f"{where}.{name}: expected spans inside [0, {self.rank}] at multiples of "
                    f"{SPAN_MULTIPLE}, found [{start}, {end}]",
                )
                _require(
                    span.width == width,
                    f"{where}.{name}: expected spans of one width ({width}), found {span.width}",
                )
        _require(
            sorted(self.head_order) == list(range(heads)),
            f"{where}.head_order: expected a permutation of 0..{heads - 1}, "
            f"found {list(self.head_order)}",
        )

    def reconstruct_flop(self, geometry: AttentionGeometry) -> int:
        """FLOP to rebuild all keys of one cached token: ``2 · w_k · s · d`` per K group."""
        return 2 * self.k_width * geometry.num_kv_heads * geometry.head_dim

    def factor_shapes(self, geometry: AttentionGeometry) -> dict[str, tuple[int, ...]]:
        """Shapes of the layer's factors, by short name."""
        return {
            "down": (self.rank, geometry.hidden_size),
            "k_up": (len(self.k_spans), self.k_group_size * geometry.head_dim, self.k_width),
            "v_up": (geometry.num_kv_heads, geometry.head_dim, self.v_width),
        }


@dataclass(frozen=True, slots=True)
class RecalkvConfig:
    """The ``recalkv`` object of ``config.json``.

    ``compression`` is the requested fraction of KV-cache numbers removed; what was reached follows
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
    format_version: int = FORMAT_VERSION
    factors_sha256: str | None = None

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], where: str = CONFIG_FILE) -> RecalkvConfig:
        """Parse and validate the ``recalkv`` object of a Hugging Face config dictionary.

        Raises:
            CheckpointError: naming the field, what was expected and what was found.
        """
        raw = config.get("recalkv")
        where = f"{where}: recalkv"
        _require(isinstance(raw, Mapping), f"{where}: expected an object, found {_brief(raw)}")
        assert raw is not None
        version = raw.get("format_version")
        _require(
            _is_int(version) and version == FORMAT_VERSION,
            f"{where}.format_version: expected {FORMAT_VERSION}, found {_brief(version)}",
        )
        _check_keys(cls, {"factors_sha256": None, **raw}, where)
        for name, kind in _PROVENANCE.items():
            _require(
                isinstance(raw[name], kind),
                f"{where}.{name}: expected {kind.__name__}, found {_brief(raw[name])}",
            )
        _require(
            isinstance(raw["compression"], int | float)
            and not isinstance(raw["compression"], bool)
            and 0 <= raw["compression"] < 1,
            f"{where}.compression: expected a number in [0, 1), found {_brief(raw['compression'])}",
        )
        digest = raw.get("factors_sha256", "0" * 64)
        _require(
            isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None,
            f"{where}.factors_sha256: expected 64 hexadecimal digits, found {_brief(digest)}",
        )
        quantization = raw["latent_quantization"]
        if quantization is not None:
            _require(
                isinstance(quantization, Mapping),
                f"{where}.latent_quantization: expected null or an object, "
                f"found {_brief(quantization)}",
            )
            try:
                quantization = LatentFormat.from_dict(quantization)
            except ValueError as error:
                raise CheckpointError(f"{where}.latent_quantization: {error}") from error
        geometry = AttentionGeometry.from_hf_config(config)
        layers = raw["layers"]
        found = len(layers) if isinstance(layers, list) else layers
        _require(
            found == geometry.num_layers,
            f"{where}.layers: expected {geometry.num_layers} entries, found {_brief(found)}",
        )
        parsed = []
        for i, layer in enumerate(layers):
            layout = LatentLayout.from_dict(layer, f"{where}.layers[{i}]")
            layout.validate(geometry, f"{where}.layers[{i}]")
            parsed.append(layout)
        return cls(**{**raw, "layers": tuple(parsed), "latent_quantization": quantization})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; :meth:`from_hf_config` reads it back."""
        raw = json.loads(json.dumps(asdict(self)))
        if self.factors_sha256 is None:
            del raw["factors_sha256"]
        return raw

    def cached_numbers_per_token(self) -> int:
        """Numbers the compressed cache holds per token, over all layers."""
        return sum(layer.rank for layer in self.layers)


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A positive number of a Hugging Face config; ``default`` where it is absent or null."""
    value: Any = config.get(name)
    if value is None:
        _require(default is not None, f"{CONFIG_FILE}: {name} is missing")
        value = default
    # A model's numbers of everything fit in 31 bits; a larger one would overflow products.
    _require(
        _is_int(value) and 0 < value < 1 << 31,
        f"{CONFIG_FILE}: {name}: expected a positive integer, found {_brief(value)}",
    )
    return value


def _brief(value: Any) -> str:
    """``repr`` of anything, on one line and not long."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer of more digits than Python prints
        return f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_keys(cls: type, raw: Any, where: str) -> None:
    _require(isinstance(raw, Mapping), f"{where}: expected an object, found {_brief(raw)}")
    expected = {f.name for f in fields(cls)}
    if missing := sorted(expected - set(raw)):
        raise CheckpointError(f"{where}: {', '.join(missing)} missing")
    if unknown := sorted(set(raw) - expected):
        raise CheckpointError(f"{where}: unknown {', '.join(unknown)}")


def factor_name(layer: int, factor: str) -> str:
    """Name of a factor tensor in ``recalkv.safetensors``."""
    return f"layers.{layer}.{factor}"


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """Read ``config.json``. Raises :class:`CheckpointError` when absent or not JSON."""
    path = Path(directory) / CONFIG_FILE
    _require(path.is_file(), f"{path}: no such file; expected a model directory")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    _require(isinstance(config, dict), f"{path}: expected a JSON object")
    return config


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
        _require(self.path.is_file(), f"{self.path}: no such file; expected the factors")
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
            _require(
                tuple(tensor.get_shape()) == shape,
                f"{self.path}: {name}: expected shape {list(shape)}, found {tensor.get_shape()}",
            )
            _require(
                tensor.get_dtype() in FACTOR_DTYPES,
                f"{self.path}: {name}: expected dtype {' or '.join(FACTOR_DTYPES)}, "
                f"found {tensor.get_dtype()}",
            )
            dtypes.add(tensor.get_dtype())
        _require(len(dtypes) == 1, f"{self.path}: expected one dtype, found {sorted(dtypes)}")
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
            _require(
                found == recorded,
                f"{self.path}: expected SHA-256 {recorded}, as {CONFIG_FILE} records, found "
                f"{found}: the file is not what was written",
            )

    def read(self, layer: int, factor: str) -> torch.Tensor:
        """Return one factor (shape of :meth:`LatentLayout.factor_shapes`), on the CPU."""
        name = factor_name(layer, factor)
        tensor = self._file.get_tensor(name)
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        _require(
            bad == 0,
            f"{self.path}: {name}: expected finite values, "
            f"found {bad} of {tensor.numel()} not finite",
        )
        return tensor


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def compression_reached(config: RecalkvConfig, geometry: AttentionGeometry) -> float:
    """Fraction of KV-cache bytes actually removed from a cache of 16-bit numbers."""
    sizes = kv_bytes_per_token(config, geometry, 2)
    return 1 - sizes["compressed"] / sizes["dense"]


def kv_bytes_per_token(
    config: RecalkvConfig, geometry: AttentionGeometry, itemsize: int
) -> dict[str, int]:
    """KV-cache bytes per token over all layers, for numbers of ``itemsize`` bytes.

    Quantised latents take what their format takes, whatever the ``itemsize``.
    """
    return {
        "dense": geometry.dense_width * geometry.num_layers * itemsize,
        "compressed": sum(
            token_bytes(config.latent_quantization, layer.rank, itemsize) for layer in config.layers
        ),
    }


def rank_budget(compression: float, geometry: AttentionGeometry) -> int:
    """Numbers per token that ``compression`` leaves, over all layers, in whole span steps.

    Rounded down, so that a checkpoint never holds more bytes than asked for.
    """
    dense = geometry.dense_width * geometry.num_layers
    # 1e-9: (1 - 0.9) · dense must not fall below an exact multiple by rounding of the float.
    return math.floor((1 - compression) * dense / SPAN_MULTIPLE + 1e-9) * SPAN_MULTIPLE
