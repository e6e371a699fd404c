"""One table of architectures: the page, the offline tool and the server follow from it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.model_executor.models.registry import (
    _MULTIMODAL_MODELS,
    _TEXT_GENERATION_MODELS,
    _TRANSFORMERS_BACKEND_MODELS,
)

from recalkv_vllm.architectures import SUPPORTED, has_fused_qkv
from recalkv_vllm.serving.names import ARCHITECTURES
from tests.supported_models import PAGE, page, refused_table, served_table


def test_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.supported_models"
    assert served_table() in page()
    assert refused_table() in page()


def test_served_names_are_those_of_the_table():
    assert {
        architecture.served_name: architecture.vllm_class for architecture in SUPPORTED.values()
    } == ARCHITECTURES
    assert len(ARCHITECTURES) == len(SUPPORTED)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_classes_are_vllms_own(model_type):
    architecture = SUPPORTED[model_type]
    module, _, name = architecture.vllm_class.partition(":")
    known_as = architecture.served_name.removeprefix("Recalkv")
    if architecture.by_transformers:
        assert known_as not in _TEXT_GENERATION_MODELS
        assert name in _TRANSFORMERS_BACKEND_MODELS
        assert known_as == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    else:
        theirs = _MULTIMODAL_MODELS if architecture.multimodal else _TEXT_GENERATION_MODELS
        assert (module.rpartition(".")[2], name) == theirs[known_as]


def test_fused_projections():
    assert [name for name in [*SUPPORTED, "gpt2", None] if has_fused_qkv(name)] == ["phi3"]


def test_tables_need_neither_torch_nor_vllm():
    code = (
        "import sys, recalkv_vllm.architectures, recalkv_vllm.names;"
        "print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
