"""``recalkv plan``: how many tokens and requests fit, dense and compressed."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from recalkv_vllm.cli.help import HelpFormatter
from recalkv_vllm.cli.memory import (
    DTYPES,
    add_memory_options,
    check_countable,
    compressed_weight_bytes,
    kv_cache_bytes,
)


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the sub-command's parser."""
    parser = commands.add_parser(
        "plan",
        help="show how many tokens and requests fit, dense and compressed",
        description="Compute KV-cache capacity from the config.json of a model or checkpoint. "
        "No weights are loaded. Decode time is that of attention at 32k tokens, predicted.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL_OR_CHECKPOINT",
        help="directory with a config.json, or a Hugging Face name owner/name",
    )
    add_memory_options(parser, required=True)
    add("--max-model-len", type=int, required=True, metavar="N", help="tokens of a full request")
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="number of devices")
    add(
        "--compression",
        type=float,
        metavar="C",
        help="for a model that is not compressed yet: the compression to assume",
    )
    add(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="dtype of weights and unquantized caches; auto: the model's own",
    )
    add(
        "--target",
        default="auto",
        metavar="NAME",
        help="device to predict decode time for: h100, h200, a100, l40s, b200, cpu-amx or cpu; "
        "auto: the one at hand, a CPU by its measured rates; none: no prediction",
    )
    return parser


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the sub-command; the JSON object.

    Raises:
        InputError: bad input, or not enough memory for the weights.
    """
    from recalkv_vllm.checkpoint import AttentionGeometry, RecalkvConfig, read_hf_config
    from recalkv_vllm.compression.base_model.find import find_model
    from recalkv_vllm.compression.errors import InputError, check_least
    from recalkv_vllm.compression.ranks.cpu_rates import cpu_rates
    from recalkv_vllm.compression.ranks.decode_time import model_decode_time
    from recalkv_vllm.compression.ranks.targets import parse_target
    from recalkv_vllm.cost import Cpu
    from recalkv_vllm.serving import capacity

    check_least(options, max_model_len=1, tensor_parallel_size=1, block_size=1)
    target = parse_target(options.target)
    device, rates = target.device, None
    if options.target == "auto" and isinstance(device, Cpu):
        rates = cpu_rates()
        device = Cpu(rates.flop_per_s, rates.bytes_per_s, device.stock_flop_per_byte)
    directory = find_model(options.model)
    hf_config = read_hf_config(directory)
    geometry = AttentionGeometry.from_hf_config(hf_config)
    check_countable(geometry, options.model)
    dtype = hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"
    itemsize = DTYPES.get(dtype if options.dtype == "auto" else options.dtype, 2)
    tp_size = options.tensor_parallel_size
    recalkv = None
    try:
        if "recalkv" in hf_config:
            recalkv = RecalkvConfig.from_hf_config(hf_config)
        elif options.compression is not None:
            recalkv = capacity.hypothetical_config(options.compression, geometry, tp_size)
        per_token = {"dense": capacity.dense_bytes_per_token(geometry, itemsize, tp_size)}
        if recalkv is not None:
            per_token["compressed"] = capacity.latent_bytes_per_token(
                recalkv, geometry, itemsize, tp_size
            )
    except ValueError as error:
        raise InputError(str(error)) from error

    weights = {"dense": capacity.weight_bytes(directory, hf_config, itemsize) // tp_size}
    if recalkv is not None:
        weights["compressed"] = compressed_weight_bytes(
            weights["dense"], recalkv, geometry, itemsize, tp_size
        )
    plans = {}
    for kind, weight in weights.items():
        cache_bytes = kv_cache_bytes(options, weight, tp_size)
        plans[kind] = {
            "weight_bytes": weight,
            "kv_cache_bytes": cache_bytes,
            **asdict(
                capacity.capacity(
                    per_token[kind], cache_bytes, options.block_size, options.max_model_len
                )
            ),
        }
    supposed = recalkv is not None and "recalkv" not in hf_config
    time = None
    if recalkv is not None and device is not None and not supposed:
        time = model_decode_time(recalkv.layers, recalkv.latent_format, geometry, device)
    return {
        "model": options.model,
        "target": target.name,
        "cpu": asdict(rates) if rates is not None else None,
        "relative_decode_time": time,
        "max_model_len": options.max_model_len,
        "tensor_parallel_size": tp_size,
        "supposed": supposed,
        **{key: {kind: plan[key] for kind, plan in plans.items()} for key in plans["dense"]},
    }


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    from rich.console import Console
    from rich.table import Table

    kinds = list(result["kv_cache_tokens"])
    table = Table(title=f"{result['model']}, per device of {result['tensor_parallel_size']}")
    for heading in ("", *kinds):
        table.add_column(heading, justify="right" if heading else "left")
    gib = 2**30
    rows = {
        "weights": [f"{result['weight_bytes'][k] / gib:.2f} GiB" for k in kinds],
        "KV cache": [f"{result['kv_cache_bytes'][k] / gib:.2f} GiB" for k in kinds],
        "KV-cache bytes per token": [f"{result['bytes_per_token'][k]:,}" for k in kinds],
        "KV-cache tokens": [f"{result['kv_cache_tokens'][k]:,}" for k in kinds],
        f"requests of {result['max_model_len']:,} tokens": [
            f"{result['max_concurrency'][k]:.2f}" for k in kinds
        ],
    }
    for label, cells in rows.items():
        table.add_row(label, *cells)
    Console().print(table)
    print(f"--target {result['target']}{_rates(result['cpu'])}{_time(result)}")
    if result["supposed"]:
        print("compressed: an estimate; this model has not been compressed yet")
    elif "compressed" not in result["kv_cache_tokens"]:
        print("compressed: pass --compression, or a compressed checkpoint")


def _time(result: dict[str, Any]) -> str:
    time = result["relative_decode_time"]
    return "" if time is None else f": decoding takes {time:.2f} of the dense cache's time"


def _rates(cpu: dict[str, float] | None) -> str:
    if cpu is None:
        return ""
    matrix, memory = cpu["flop_per_s"] / 1e12, cpu["bytes_per_s"] / 1e9
    return f" (matrix products {matrix:.2f} TFLOP/s, memory {memory:.0f} GB/s, measured)"
