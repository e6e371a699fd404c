"""Options of vLLM that do not go with a compressed checkpoint."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from recalkv_vllm.serving.attention.backend import SUPPORTED_DTYPES
from recalkv_vllm.serving.names import BACKEND_NAME, HYBRID, MULTIMODAL, TEXT_ALONE
from recalkv_vllm.serving.startup.connectors import unsupported_connector

#: Ways of speculation that give the tokens of a run without in our tests.
TESTED_SPECULATION = (
    *("ngram", "ngram_gpu", "suffix", "custom_class"),
    *("draft_model", "eagle", "eagle3", "mtp", "medusa", "dflash", "dspark"),
    "extract_hidden_states",
)


def unsupported_option(config: VllmConfig, requested: str | None) -> str | None:
    """The first option that does not go with a compressed checkpoint, and why; None if all do.

    Args:
        config: of the engine.
        requested: name of the attention backend that was asked for.
    """
    parallel, model = config.parallel_config, config.model_config
    speculative, transfer = config.speculative_config, config.kv_transfer_config
    connector = transfer and unsupported_connector(
        transfer.kv_connector,
        transfer.kv_connector_extra_config,
        not current_platform.is_cpu(),
        parallel.world_size,
    )
    hybrid = bool(HYBRID & {*model.architectures})
    refusals = {
        f"--attention-backend: expected recalkv for a compressed checkpoint, found {requested}": (
            requested not in (None, BACKEND_NAME)
        ),
        f"--dtype: expected one of {SUPPORTED_DTYPES}, found {model.dtype}": (
            model.dtype not in SUPPORTED_DTYPES
        ),
        "--decode-context-parallel-size: expected 1, found "
        f"{parallel.decode_context_parallel_size}": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size: expected 1, found "
        f"{parallel.prefill_context_parallel_size}": parallel.prefill_context_parallel_size > 1,
        f"--kv-transfer-config: {connector}": connector is not None,
        "--limit-mm-per-prompt: expected '{\"image\": 0}' for a model whose images attend to "
        "themselves in both directions, which latents are not served with": model.is_mm_prefix_lm,
        """--limit-mm-per-prompt: expected '{"image": 0, "video": 0}' for a model that gives """
        "images positions of several dimensions, which latents are not served with": (
            bool(TEXT_ALONE & {*model.architectures}) and model.supports_multimodal_inputs
        ),
        "--enable-lora: expected a language model alone, found one of several modalities": (
            config.lora_config is not None and bool(MULTIMODAL & {*model.architectures})
        ),
        f"--speculative-config: expected method {' or '.join(TESTED_SPECULATION)}, found "
        f"{speculative and speculative.method}": (
            speculative is not None and speculative.method not in TESTED_SPECULATION
        ),
        "--speculative-config: expected none for a model some of whose layers have no attention: "
        "not tested": speculative is not None and hybrid,
        "--kv-transfer-config: expected none for a model some of whose layers have no attention: "
        "not tested": transfer is not None and hybrid,
        # vLLM 0.32 looks for the group of an EAGLE head, not for that of a draft model.
        "--speculative-config: beside sliding-window layers, draft_model needs "
        "--disable-hybrid-kv-cache-manager: vLLM gives a draft model the blocks of the first "
        "cache group": (
            speculative is not None
            and speculative.method == "draft_model"
            and any(
                getattr(each.hf_text_config, "sliding_window", None)
                for each in (model, speculative.draft_model_config)
            )
            and not config.scheduler_config.disable_hybrid_kv_cache_manager
        ),
    }
    return next((message for message, refused in refusals.items() if refused), None)
