"""Variants of attention that latents are not served with are refused by the field that asks."""

import pytest
from transformers import AutoConfig

from recalkv_vllm.architectures import SUPPORTED
from recalkv_vllm.compression.base_model.support import (
    ATTENTION_FIELDS,
    ROPE_FIELDS,
    supported_architecture,
)
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.refused_architectures import REFUSED


def config(model_type: str, **changes) -> dict:
    return {**AutoConfig.for_model(model_type).to_dict(), **changes}


@pytest.mark.parametrize("field", ATTENTION_FIELDS)
def test_fields_that_change_attention(field):
    for model_type, architecture in SUPPORTED.items():
        if architecture.multimodal:
            continue  # its language model's are looked at
        changed = {"model_type": model_type, field: 1}
        if field in architecture.reads:
            assert supported_architecture(changed) is architecture
        else:
            with pytest.raises(InputError, match=f"^{model_type} with {field} is not supported$"):
                supported_architecture(changed)


def test_what_architectures_read_is_among_the_fields():
    known = {*ATTENTION_FIELDS, *ROPE_FIELDS}
    assert {field for entry in SUPPORTED.values() for field in entry.reads} <= known


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_configurations_as_transformers_makes_them(model_type):
    """All fields that a type of model has are harmless as they are by default."""
    assert supported_architecture(config(model_type)) is SUPPORTED[model_type]


@pytest.mark.parametrize("model_type", REFUSED)
def test_types_that_are_refused(model_type):
    assert model_type not in SUPPORTED
    with pytest.raises(InputError, match=f"{model_type!r} is not supported: "):
        supported_architecture({"model_type": model_type})


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("llama", {"layer_types": ["full_attention", "mamba"]}, "layers of mamba"),
        ("mistral", {"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta"),
        ("qwen2", {"rope_scaling": {"mrope_section": [8, 12, 12]}}, "mrope_section of RoPE"),
        ("gemma3_text", {"rope_parameters": {"full": {"mrope_section": [8]}}}, "mrope_section"),
        ("smollm3", {"rope_parameters": {"rope_type": "dynamic"}}, "dynamic RoPE"),
        ("llama", {"is_causal": False}, "is_causal"),
        ("gemma3_text", {"architectures": ["Rnj1ForCausalLM"]}, "architectures Rnj1ForCausalLM"),
        ("llava", {"text_config": None}, "llava without a text_config"),
        ("llava", {"text_config": {"model_type": "llama", "clip_qkv": 8}}, "llama with clip_qkv"),
        (
            "mistral3",
            {"text_config": {"model_type": "ministral3"}},
            "'ministral3' is not supported",
        ),
        ("llava", {"text_config": {"model_type": "phi3"}}, "llava beside a phi3"),
        ("llava", {"text_config": {"model_type": "olmo2"}}, "llava beside a olmo2"),
        ("llava", {"quantization_config": {"quant_method": "awq"}}, "that are not quantized"),
    ],
)
def test_refused(model_type, changes, message):
    with pytest.raises(InputError, match=message):
        supported_architecture(config(model_type, **changes))


@pytest.mark.parametrize("name", ["PhiMoEForCausalLM", "PhimoeForCausalLM"])
def test_names_of_vllm_and_of_transformers(name):
    supported_architecture(config("phimoe", architectures=[name]))


def test_ropes_that_vllm_settles_at_start_up():
    for model_type in ("llama", "phi3"):
        changed = config(model_type, rope_parameters={"rope_type": "longrope"})
        assert supported_architecture(changed) is SUPPORTED[model_type]
