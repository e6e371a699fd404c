"""The model card of a compressed checkpoint."""

from __future__ import annotations

from typing import Any

from recalkv_vllm.checkpoint import RecalkvConfig


def model_card(name: str, base: str, recalkv: RecalkvConfig, summary: dict[str, Any]) -> str:
    """Markdown text of ``README.md``.

    Args:
        name: of the checkpoint directory.
        base: name of the base model.
        recalkv: what was done.
        summary: as :func:`recalkv_vllm.compression.output.summary.summarize` gives it.
    """
    bytes_per_token = summary["kv_bytes_per_token"]
    settings = recalkv.settings
    calibration = recalkv.calibration
    if calibration:
        text = (
            f"{calibration['samples']} samples of {calibration['seq_len']} tokens of "
            f"{calibration['dataset']} (seed {calibration['seed']})"
        )
    else:
        text = "none (not needed)"
    latent_format = recalkv.latent_format(0)
    latents = "in the dtype of the factors"
    if recalkv.layers[0].bands is not None:
        latents = "in bands of 2 to 8 bits, a scale for every 32 elements"
    elif latent_format is not None:
        latents = f"{latent_format.dtype}, a scale for every {latent_format.group_size} elements"
    rows = "\n".join(
        f"| {layer['layer']} | {layer['rank']} | {layer['k_width']} | {layer['v_width']} "
        f"| {layer['k_error']:.4f} | {layer['v_error']:.4f} |"
        for layer in summary["layers"]
    )
    versions = ", ".join(f"{k} {v}" for k, v in sorted(recalkv.tool_versions.items()))
    return f"""---
library_name: vllm
tags: [recalkv, kv-cache-compression]
---

# {name}

{base} with a low-rank KV cache: {bytes_per_token["compressed"]} bytes per token instead of
{bytes_per_token["dense"]} ({summary["compression"]:.1%} removed).

Serve it with vLLM and the recalkv_vllm plugin:

```
vllm serve {name} --attention-backend recalkv
```

The weights in `model*.safetensors` hold the same compressed projections in dense form, so
`transformers` and any other tool load this directory as the stock architecture and give the served
model's accuracy (without the smaller cache).

## How it was made

| | |
| --- | --- |
| method | {recalkv.method} |
| latents | {latents} |
| compression asked for | {recalkv.compression} |
| KV heads per K group | {settings["k_group_size"]} |
| V groups | {settings["v_groups"]} |
| rank allocation | {settings["rank_allocation"]} |
| calibration text | {text} |
| healing | {_healing(settings.get("healing"))} |
| reconstruction | {summary["reconstruct_flop_per_token"]} FLOP per cached token |
| made with | {versions} |

## Layers

Rank is the count of cached elements per token; widths are those of one K or V group. Errors are
relative, of the {summary["error_of"]} of the key and value projections, before any healing.

| layer | rank | K width | V width | K error | V error |
| --- | --- | --- | --- | --- | --- |
{rows}
"""


def _healing(record: dict[str, Any] | None) -> str:
    """What came of healing, in words."""
    if record is None:
        return "none"
    return (
        f"{record['steps']} steps; divergence from the base model on held-out text "
        f"{record['loss_after']:.4f} nats per token, {record['loss_before']:.4f} before"
    )
