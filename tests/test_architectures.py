"""One table of architectures: the page, the offline tool and the server follow from it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

from recalkv_vllm.architectures import SUPPORTED, has_fused_qkv
from recalkv_vllm.serving.names import ARCHITECTURES
from tests.supported_models import PAGE, page, table


def test_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.supported_models"
    assert table() in page()


def test_served_names_are_those_of_the_table():
    assert {
        architecture.served_name: architecture.vllm_class for architecture in SUPPORTED.values()
    } == ARCHITECTURES
    assert len(ARCHITECTURES) == len(SUPPORTED)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_classes_are_vllms_own(model_type):
    module, _, name = SUPPORTED[model_type].vllm_class.partition(":")
    assert (module.rpartition(".")[2], name) == _TEXT_GENERATION_MODELS[name]
    assert SUPPORTED[model_type].served_name == f"Recalkv{name}"


def test_fused_projections():
    assert [name for name in [*SUPPORTED, "gpt2", None] if has_fused_qkv(name)] == ["phi3"]


def test_tables_need_neither_torch_nor_vllm():
    code = (
        "import sys, recalkv_vllm.architectures, recalkv_vllm.names;"
        "print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
