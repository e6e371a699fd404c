"""The ops in C++ (``csrc/cpu``), bound for torch tensors on the CPU.

``RECALKV_CPU_ISA=avx2|avx512|avx512_bf16`` forces an instruction set below the best one.
"""

from __future__ import annotations

import importlib
import os

import torch

from recalkv_vllm.latent_format import LatentFormat
from recalkv_vllm.ops import cpu_tables
from recalkv_vllm.ops.dispatch import BoundAttention
from recalkv_vllm.ops.layer import NO_HINTS, BatchHints, LatentLayer

try:
    importlib.import_module("recalkv_vllm._cpu")
    _import_error = None
except ImportError as error:
    _import_error = error

LARGEST_HEAD_DIM = 256


def instruction_set(dtype: torch.dtype) -> str:
    """Name of the instruction set that kernels for ``dtype`` use; empty if there is none."""
    forced = os.environ.get("RECALKV_CPU_ISA")
    best = torch.ops.recalkv_cpu.best_isa(dtype)
    if not forced:
        return best
    # The bf16 dot product is for bf16 alone; other dtypes then use what comes next.
    return best if forced == "avx512_bf16" and dtype != torch.bfloat16 else forced


def unsupported_reason(
    device: torch.device, dtype: torch.dtype, head_dim: int | None
) -> str | None:
    """Why these kernels cannot run, or None."""
    if _import_error is not None:
        return (
            f"the C++ extension cannot be loaded ({_import_error}); build it with "
            "'pip install --no-build-isolation -e .', or set RECALKV_KERNEL=reference"
        )
    if device.type != "cpu":
        return f"expected a tensor on the CPU, found {device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"expected float32, bfloat16 or float16, found {dtype}"
    isa = instruction_set(dtype)
    if not isa:
        return "expected a processor with AVX2, FMA and F16C"
    if not torch.ops.recalkv_cpu.isa_supported(isa):
        return f"RECALKV_CPU_ISA: expected an instruction set of this processor, found {isa!r}"
    if head_dim is not None and (head_dim % 16 or not 0 < head_dim <= LARGEST_HEAD_DIM):
        return f"expected a head size in multiples of 16 up to {LARGEST_HEAD_DIM}, found {head_dim}"
    return None


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """Instruction set and threads, for the log."""
    return f"C++ {instruction_set(dtype)}, {torch.get_num_threads()} threads"


def latent_cache_update(
    z: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    latent_format: LatentFormat | None = None,
) -> None:
    """See :func:`recalkv_vllm.ops.reference.latent_cache_update`."""
    how = ("", 0) if latent_format is None else (latent_format.dtype, latent_format.group_size)
    torch.ops.recalkv_cpu.latent_cache_update(z, kv_cache, slot_mapping, *how)


def pair_order(head_dim: int, rot_dim: int, is_neox: bool) -> torch.Tensor:
    """Columns of a head with the two members of every rotation pair side by side."""
    order = torch.arange(head_dim)
    if is_neox:
        order[:rot_dim] = order[:rot_dim].view(2, -1).T.flatten()
    return order


class CpuAttention(BoundAttention):
    """A layer's factors packed; see :func:`recalkv_vllm.ops.reference.paged_latent_attention`."""

    def __init__(self, layer: LatentLayer):
        isa = instruction_set(layer.k_up.dtype)
        compute_dtype = torch.bfloat16 if isa == "avx512_bf16" else torch.float32
        rope = layer.cos_sin_cache
        order = pair_order(layer.head_dim, layer.rot_dim, layer.is_neox)
        k_factors = layer.k_up.reshape(-1, layer.head_dim, layer.k_width)[:, order]
        k_factors = k_factors.to(compute_dtype).contiguous()
        classes = torch.classes.recalkv_cpu
        rotation = expansion = None
        if rope is not None:
            rotation = classes.Rotation(
                tiles=cpu_tables.rope_tiles(rope),
                max_position=rope.shape[0],
                is_neox=layer.is_neox,
            )
            # A key norm needs the whole key.
            if isa == "avx512_bf16" and layer.k_norm_weight is None:
                expansion = self._expansion(k_factors, rope)
        bias, norm, latent_format = layer.k_bias, layer.k_norm_weight, layer.latent_format
        self._layer = classes.AttentionLayer(
            isa=isa,
            keys=classes.Keys(
                factors=k_factors,
                bias=None if bias is None else bias[:, order].float().contiguous(),
                norm_weight=None if norm is None else norm[order].float().contiguous(),
                norm_eps=layer.k_norm_eps,
            ),
            spans=classes.Spans(
                k_starts=[span.start for span in layer.k_spans],
                v_starts=[span.start for span in layer.v_spans],
                v_width=layer.v_width,
            ),
            rotation=rotation,
            expansion=expansion,
            logits=classes.Logits(
                scale=layer.scale,
                soft_cap=layer.soft_cap or 0.0,
                window=layer.sliding_window or 0,
            ),
            latent_dtype="" if latent_format is None else latent_format.dtype,
            group_size=0 if latent_format is None else latent_format.group_size,
        )

    @staticmethod
    def _expansion(k_factors: torch.Tensor, rope: torch.Tensor) -> torch.ScriptObject | None:
        """The layer's low-frequency pairs, packed; None where there are none."""
        found = cpu_tables.expansion(rope, k_factors.shape[1])
        if found is None:
            return None
        slow = k_factors[:, 2 * found.exact_pairs :]
        return torch.classes.recalkv_cpu.Expansion(
            basis=found.basis,
            coefficients=found.coefficients,
            pair_factors=slow.unflatten(1, (-1, 2)).transpose(2, 3).contiguous(),
        )

    def __call__(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        hints: BatchHints = NO_HINTS,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.recalkv_cpu.paged_latent_attention.default(
            self._layer, q, kv_cache, block_table, seq_lens, query_start_loc
        )


bind_paged_latent_attention = CpuAttention


def latent_value_up(
    o_lat: torch.Tensor,
    v_up: torch.Tensor,
    v_bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """See :func:`recalkv_vllm.ops.reference.latent_value_up`."""
    bias = None if v_bias is None else v_bias.float().contiguous()
    return torch.ops.recalkv_cpu.latent_value_up(
        o_lat.float().contiguous(),
        v_up.contiguous(),
        bias,
        out_dtype or v_up.dtype,
        instruction_set(v_up.dtype),
    )


if _import_error is None:

    @torch.library.register_fake("recalkv_cpu::latent_cache_update")
    def _(z, kv_cache, slot_mapping, latent_dtype, group_size) -> None:
        return None

    @torch.library.register_fake("recalkv_cpu::latent_value_up")
    def _(
        o_lat: torch.Tensor,
        v_up: torch.Tensor,
        v_bias: torch.Tensor | None,
        out_dtype: torch.dtype,
        isa: str,
    ) -> torch.Tensor:
        return v_up.new_empty((*o_lat.shape[:2], v_up.shape[1]), dtype=out_dtype)

    @torch.library.register_fake("recalkv_cpu::paged_latent_attention")
    def _(
        layer: torch.ScriptObject,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, heads, _ = q.shape
        return (
            q.new_empty((tokens, heads, layer.v_width()), dtype=torch.float32),
            q.new_empty((tokens, heads), dtype=torch.float32),
        )
