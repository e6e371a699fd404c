"""The table of vLLM's features, from which the page ``docs/supported_features.md`` is made.

Rewrite the page with ``python -m tests.e2e.features``; a test compares it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "supported_features.md"
TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Feature:
    """A row; ``tests`` are ``file::function`` under the folder of tests, ``state`` may be why."""

    name: str
    state: str
    tests: tuple[str, ...]


def works(name: str, *tests: str) -> Feature:
    return Feature(name, "works", tests)


def emulated(name: str, *tests: str) -> Feature:
    """What only a GPU has, shown with kernels interpreted or emulated on a CPU."""
    return Feature(name, "emulated", tests)


def refused(name: str, why: str, *tests: str) -> Feature:
    """A feature that a compressed model is not served with; why is for the page."""
    return Feature(name, why, tests)


def wrong(name: str, *tests: str) -> Feature:
    """What no server could make sense of."""
    return Feature(name, "", tests)


EQUALITY, FEATURES = "e2e/test_token_equality.py", "e2e/test_features.py"
SERVER, REFUSALS = "e2e/test_server.py", "e2e/test_refusals.py"
BASES, RELOAD = "e2e/test_quantized_base.py", "e2e/test_reload.py"
QUANTIZED, ALONE = "e2e/test_quantized_latents.py", "e2e/test_factors_only.py"
PARALLEL, LORA = "e2e/test_distribution.py", "serving/test_lora.py"
SHARDS, COMPILED = "serving/test_sharding.py", "serving/test_captured_code.py"
HUB, CONNECTORS = "e2e/test_hub.py", "serving/test_connectors.py"
RUNNER_V2 = "e2e/test_model_runner_v2.py"
SPECULATION, REQUESTS = "e2e/test_speculation.py", "e2e/test_requests.py"
STARTUP, ARCHITECTURES = "serving/test_startup.py", "e2e/test_architectures.py"
OPTION = f"{REFUSALS}::test_unsupported_option"

SHOWN = (
    works(
        "OpenAI-compatible HTTP",
        f"{SERVER}::test_concurrent_requests_get_the_answers_they_get_alone",
    ),
    works("Streaming, abort", f"{SERVER}::test_abort_frees_the_latents"),
    works("Prometheus metrics of compression", f"{SERVER}::test_metrics_of_compression"),
    works(
        "The model's own dtype (bfloat16)",
        "e2e/test_default_dtype.py::test_log_probabilities_are_as_good_as_transformers",
    ),
    works("Continuous batching", f"{EQUALITY}::test_sixteen_at_once"),
    works("Chunked prefill with context", f"{EQUALITY}::test_chunked_prefill_with_context"),
    works(
        "Prefix caching, mixed with requests that have no cached prefix",
        f"{EQUALITY}::test_prefix_caching",
    ),
    works("Preemption and recompute", f"{EQUALITY}::test_preemption"),
    works(
        "All of it at once, with n-gram speculation, offloading, structured output and LoRA",
        "e2e/test_everything_at_once.py::test_everything_at_once",
    ),
    works("Pausing generation and resuming it", f"{REQUESTS}::test_pause_and_resume"),
    works("Streaming input", f"{REQUESTS}::test_streamed_input"),
    works("Several samples per prompt (`n`)", f"{FEATURES}::test_several_samples_of_a_prompt"),
    works("Beam search", f"{FEATURES}::test_beam_search"),
    works("Log-probabilities, including the prompt's", f"{FEATURES}::test_log_probabilities"),
    works("Structured output", f"{FEATURES}::test_structured_output"),
    works("Embedding (`--runner pooling --convert embed`)", f"{FEATURES}::test_embedding"),
    works("Prompts as embeddings", "e2e/test_prompt_embeddings.py::test_prompts_as_embeddings"),
    works(
        "`--max-model-len` beyond the calibration length",
        f"{FEATURES}::test_context_longer_than_calibrated",
    ),
    works("N-gram speculation", f"{FEATURES}::test_ngram_speculation"),
    works(
        "Speculation with a draft model, stock or compressed; beside sliding windows with "
        "`--disable-hybrid-kv-cache-manager`",
        f"{FEATURES}::test_draft_model_speculation",
    ),
    works(
        "EAGLE, EAGLE-3 and Medusa heads, with windows too; MTP layers of the checkpoint",
        f"{SPECULATION}::test_heads",
        f"{SPECULATION}::test_the_checkpoints_own_head",
    ),
    works(
        "Speculation by `suffix` (with `arctic-inference`), by a class of one's own "
        "(`custom_class`), and by `ngram_gpu`, whose memory tests do not pin",
        f"{SPECULATION}::test_lookups",
    ),
    works(
        "`extract_hidden_states`, with `ExampleHiddenStatesConnector`, which tests make copy "
        "without streams of CUDA",
        f"{SPECULATION}::test_hidden_states",
    ),
    works("Sliding window, soft cap, key norm", f"{ARCHITECTURES}::test_full_rank_equals_stock"),
    works("Tensor parallel", f"{PARALLEL}::test_tensor_parallel_with_a_k_and_a_v_group_per_rank"),
    works(
        "Tensor parallel with one group for all ranks",
        f"{PARALLEL}::test_tensor_parallel_with_one_group_for_all_ranks",
    ),
    works("Pipeline parallel", f"{PARALLEL}::test_pipeline_parallel"),
    works(
        "Expert parallel, for which tests map experts that vLLM's kernel for CPUs does not",
        f"{PARALLEL}::test_expert_parallel",
    ),
    works("Data parallel", f"{REQUESTS}::test_data_parallel"),
    works(
        "`torch.compile` of the model around attention", f"{FEATURES}::test_compiled_by_inductor"
    ),
    works(
        "Captured code never reads from the device on the host",
        f"{COMPILED}::test_nothing_is_read_from_the_device",
    ),
    works(
        "The C++ and CUDA ops under fake tensors (`torch.library.opcheck`)",
        "ops/test_tracing.py::test_attention",
        "cuda/test_tracing.py::test_ops",
    ),
    emulated(
        "CUDA graphs of decode and verification: metadata, launches replayed on padded batches",
        "serving/test_graph_capture.py::test_captured_metadata_shows_the_batch_of_a_replay",
        "cuda/test_tracing.py::test_replayed_calls_serve_padded_batches",
        "kernels/test_attention.py::test_replayed_launches_serve_padded_batches",
    ),
    emulated(
        "Model Runner V2, which vLLM takes on GPUs: chunked prefill, prefix caching, preemption, "
        "sliding windows, latents in bands, structured output, abort",
        f"{RUNNER_V2}::test_tokens_equal_stock_on_either_runner",
        f"{RUNNER_V2}::test_prefix_caching",
        f"{RUNNER_V2}::test_preemption",
        f"{RUNNER_V2}::test_sliding_windows",
        f"{RUNNER_V2}::test_chunked_prefill_of_quantized_latents",
        f"{RUNNER_V2}::test_structured_output",
        f"{RUNNER_V2}::test_abort",
    ),
    emulated(
        "The same with a draft model, with random heads of DFlash and DSpark, in tensor parallel, "
        "and on the Triton kernels",
        f"{RUNNER_V2}::test_draft_model_speculation",
        f"{RUNNER_V2}::test_blocks_drafted_in_one_pass",
        f"{RUNNER_V2}::test_tensor_parallel",
        f"{RUNNER_V2}::test_triton_kernels",
    ),
    works(
        "Factors alone, on the unmodified base model", f"{ALONE}::test_tokens_equal_the_base_models"
    ),
    works("Models and factors by Hugging Face hub name", f"{HUB}::test_tokens_of_what_the_hub_has"),
    works(
        "The same without a network, from the local hub cache",
        f"{HUB}::test_tokens_of_what_is_cached_without_a_network",
    ),
    works(
        "Base weights quantized by compressed-tensors (int4), AWQ or GPTQ",
        f"{BASES}::test_tokens_equal_stock",
    ),
    works(
        "Base weights and activations quantized by compressed-tensors (int8, fp8)",
        f"{BASES}::test_quantized_activations_change_no_more_than_in_stock",
    ),
    works(
        "`--load-format dummy` with a reload; `runai_streamer`; `sharded_state`, for which tests "
        "keep weights that vLLM packs away on CPUs",
        "e2e/test_load_formats.py::test_sharded_state",
        "e2e/test_load_formats.py::test_random_weights_and_then_those_of_the_checkpoint",
        "e2e/test_load_formats.py::test_runai_streamer",
    ),
    works(
        "`reload_weights` from a checkpoint, or of tensors under the factors' names",
        f"{RELOAD}::test_the_engine_serves_what_it_reloaded",
        f"{RELOAD}::test_part_of_the_weights_replaces_that_part",
    ),
    emulated(
        "Sleep mode, levels 1 and 2, with a pretended allocator; `reload_weights` while graphs "
        "hold attention",
        "e2e/test_sleep.py::test_sleep_and_wake_up",
        "kernels/test_rebind.py::test_captured_launches_compute_with_the_new_weights",
        "cuda/test_tracing.py::test_replayed_calls_see_the_weights_that_a_layer_is_bound_to_anew",
    ),
    works("LoRA on modules other than k and v", f"{FEATURES}::test_lora_on_other_modules"),
    works(
        "KV connectors `ExampleConnector` and `OffloadingConnector`, alone or by `MultiConnector`",
        f"{FEATURES}::test_latents_go_through_kv_connectors",
    ),
    works(
        "Prefill in one engine and decoding in another by `NixlConnector`, each of one rank",
        "e2e/test_disaggregation.py::test_nixl",
    ),
    works(
        "`canonical_layout` of `OffloadingConnector`: what it maps",
        f"{CONNECTORS}::test_canonical_pages_hold_what_every_rank_caches",
    ),
    works(
        "Block offloading with a test worker: half the cache, half the bytes moved",
        f"{FEATURES}::test_offloading_moves_half_the_bytes_of_half_the_cache",
    ),
    works(
        "Tiered offloading with a cold tier: files of entropy-coded latents, on CPUs too",
        "e2e/test_cold_tier.py::test_files_are_restored_and_damaged_ones_computed",
        "serving/cold_tier/test_codec.py::test_poisoned_memory_comes_back",
        "serving/cold_tier/test_store.py::test_damage_is_found",
    ),
    works("Latents quantized to int8, int4 or fp8", f"{QUANTIZED}::test_chunked_prefill"),
    works(
        "`--kv-cache-dtype fp8` and `fp8_e4m3` for unquantized latents",
        f"{QUANTIZED}::test_capacity",
    ),
)

REFUSED = (
    refused(
        "Decode or prefill context parallel",
        "vLLM 0.32 leaves the exchange between ranks to every backend, and its own attention on "
        "CPUs has none to compare with",
        f"{STARTUP}::test_refused",
    ),
    refused(
        "LoRA on k or v",
        "vLLM adds an adapter's product to what a projection gives, before it is cached; a latent "
        "has no place for it",
        f"{LORA}::test_keys_and_values_are_refused",
    ),
    refused(
        "Other KV connectors; offloading on a CPU",
        "LMCache takes a page for keys and values of the model's heads; others need GPUs or "
        "services that the tests have not; vLLM 0.32 offloads from GPUs only, our cold tier from "
        "CPUs too",
        OPTION,
        f"{CONNECTORS}::test_refused",
    ),
)

WRONG = (
    wrong(
        "A way to speculate that vLLM 0.32 has no proposer for, such as `mlp_speculator`",
        f"{STARTUP}::test_refused",
    ),
    wrong("Another `--attention-backend` on a compressed checkpoint", OPTION),
    wrong(
        "`--attention-backend recalkv` on a model without factors",
        f"{REFUSALS}::test_stock_model_under_our_flag_ends_vllm_serve_with_one_line",
    ),
    wrong("A checkpoint in a newer format", f"{REFUSALS}::test_newer_format"),
    wrong(
        "Missing, truncated, poisoned or foreign factors",
        f"{REFUSALS}::test_missing_factors",
        f"{REFUSALS}::test_truncated_factors",
        f"{REFUSALS}::test_poisoned_factors",
        f"{REFUSALS}::test_factors_of_another_model",
    ),
    wrong(
        "A sharded state of another number of ranks",
        "serving/test_sharded_state.py::test_other_ranks",
    ),
    wrong("Factors missing from the hub", f"{HUB}::test_what_the_hub_has_not"),
    wrong(
        "Factors of another base model or revision",
        f"{ALONE}::test_another_base_is_refused",
        f"{ALONE}::test_another_revision_of_the_base_is_refused",
    ),
    wrong(
        "A `--kv-cache-dtype` that is not the checkpoint's own format, and not `fp8` of latents "
        "that are not quantized",
        OPTION,
        f"{QUANTIZED}::test_format_of_the_checkpoint_stays",
    ),
    wrong(
        "Tensor-parallel sizes that neither divide heads and groups nor are divided by them",
        f"{SHARDS}::test_what_does_not_divide_is_refused_with_both_numbers",
    ),
    wrong(
        "`reload_weights` with key or value projections sent in place of factors, or with another "
        "layout",
        f"{RELOAD}::test_projections_sent_in_place_of_factors_are_refused",
        f"{RELOAD}::test_a_checkpoint_of_other_ranks_is_refused",
    ),
    wrong(
        "A LoRA adapter on q or o that means heads in another order than compression gave them",
        f"{LORA}::test_heads_must_be_where_the_adapter_means_them",
    ),
    wrong(
        "Base weights in other formats, with a quantized KV cache, or with fused projections "
        "(by `recalkv compress`)",
        "cli/test_bad_input.py::test_quantized_weights_that_are_not_read",
        "cli/test_bad_input.py::test_quantized_weights_that_are_fused",
    ),
)

#: All rows.
TABLE = (*SHOWN, *REFUSED, *WRONG)

TEXT = """# Supported features

Every feature here is either tested against stock vLLM or refused at start-up with a message that
names the option. What works was seen to work with vLLM's CPU build. "emulated" is what only a GPU
has: its tests interpret or emulate kernels on a CPU, and no GPU has run it
([a first run on a GPU](gpu_first_run.md)). This page is
written by `python -m tests.e2e.features`.

{shown}

## Features that are refused

{refused}

## What is refused as wrong input

{wrong}

## Notes

A compressed checkpoint needs no flag: its architecture selects the backend. The flag states the
intention, and makes vLLM refuse a model that has no factors.

Cascade attention is an optimization that vLLM asks a backend for; this backend does not offer it.
Attention sinks are part of a model, as in gpt-oss, and need no option.

## KV connectors

vLLM 0.32 offloads from GPUs only, so the tests give `OffloadingConnector` a worker that copies
pages on the host; the connector itself decides which pages, and where they go. With
`canonical_layout`, pages of all ranks are stored as one; a rank's latents are a head of it, or a
part by itself, and come back as they were. `TieringOffloadingSpec` is not tested and refused;
`ColdTierSpec`, which adds a [cold tier](guide/cold_tier.md) to it, has a worker for CPUs of its
own.

`NixlConnector` copies whole pages, whatever a layer's rank. Between engines of unequal
tensor-parallel sizes it would cut them by the model's KV heads, which a latent has not, so both
engines must be of one rank. The tests ran with `nixl` 1.5.2 and UCX, between two processes of one
host.

## Speculation

The layers of a draft model or of a head have their own dense cache and vLLM's own attention,
whatever the model's; compression changes neither. An MTP layer stays in the compressed checkpoint
as it was, and `{{"method": "mtp"}}` finds it there; for GLM-4.5, which vLLM tells by the name of
its architecture, `"model"` has to name the base model. Of `arctic-inference`, vLLM asks for version
0.1.1; the tests ran with its module `suffix_decoding` alone.

vLLM 0.32 looks for the cache group of a head's layers, but gives a draft model the blocks of the
first group, and layers of several groups share memory. So beside windows, of either model, all
layers have to be in one group; a window's blocks are then kept to the end of the request.

## LoRA on a CPU

On a CPU, vLLM 0.32 computes requests without an adapter, where they run beside some with one, with
the last of the `--max-loras` places: let there be one more than adapters in use, which stays zero.
This is so for stock models too.

## Metrics

`/metrics` has `recalkv_info` (labels `model_name`, `method`, `compression`, `latent_dtype`,
`version`) and `recalkv_kv_cache_bytes_per_token` (labels `model_name` and `cache`: `dense` or
`compressed`), besides all of vLLM's own.

## Reloading weights

`reload_weights` reads a checkpoint's base weights and factors again, from the engine's directory or
from `weights_path`. The new checkpoint must have the same ranks, spans and latent format. Tensors
that a trainer sends have the names in the checkpoint's files, with `layers.N.down`, `layers.N.k_up`
and `layers.N.v_up` of `recalkv.safetensors` (N counts layers with attention) in place of key and
value projections; those are refused, and so are factors in kernel format. Where CUDA graphs hold
attention, what kernels packed is overwritten in place. One case is refused: the CUDA kernel takes
the largest weight of a key norm as a number, which graphs hold as it was. For new norms, start the
engine with `--compilation-config '{{"cudagraph_mode": "PIECEWISE"}}'`.
Reset the prefix cache afterwards, as for any model.

## Load formats

What `save_sharded_state` writes has factors among its tensors; copy all files but the checkpoint's
`*.safetensors` beside it, as vLLM's example does. `dummy` weights are replaced by `update_config`
and `reload_weights`, as for any model. `fastsafetensors`, with which vLLM reads into GPUs only, and
`tensorizer` have not been tried.

## Sleep mode

At level 1 vLLM saves all that it allocated with the weights, packed factors among them. At level 2
it keeps buffers, such as tables of RoPE, and discards the rest: call `reload_weights` after
`wake_up`, as for any model.

## Memory under tensor parallelism

A rank caches the latents of the K and V groups that its KV heads read, and holds only its own
heads' rows of the up factors. A group that heads of several ranks read is cached by each of those
ranks, like the latent of MLA. So with one latent per KV head, or with groups no larger than a
rank's heads, capacity grows with the number of ranks as in stock vLLM. With one group over all
heads, every rank caches all of it, and capacity stays that of one rank. To avoid that, compress
with groups that divide among the ranks: `--k-group-size` at most the KV heads of a rank, and
`--v-groups` a multiple of the number of ranks.

## Factors alone

`recalkv compress MODEL -o DIR --factors-only` writes `recalkv.safetensors` and `config.json`, and
prints the command that serves them on the unmodified base model. Both may be directories or names
on the Hugging Face hub; `"recalkv": {{"factors": "owner/name", "revision": "v1"}}` pins the
factors' revision, and `--revision` the base model's. If compression reordered heads, the base
model's heads are reordered while its weights load; heads of quantized weights cannot be, and stay
in place. A digest of the base model's key and value projections detects another revision.
"""


def table(heading: tuple[str, ...], rows: tuple[Feature, ...]) -> str:
    """Rows in Markdown; ``heading`` leaves out the state where there is none."""
    lines = [f"| {' | '.join(heading)} |", "| " + " | ".join("---" for _ in heading) + " |"]
    for row in rows:
        shown = ", ".join(f"`{test}`" for test in row.tests)
        lines.append(f"| {' | '.join(filter(None, (row.name, row.state, shown)))} |")
    return "\n".join(lines)


def page() -> str:
    return TEXT.format(
        shown=table(("vLLM feature", "State", "Where it is shown"), SHOWN),
        refused=table(("Feature", "Why", "Where it is shown"), REFUSED),
        wrong=table(("Input", "Where it is shown"), WRONG),
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
