"""Commands of the offline tool, page by page and in order, on a model that is quick."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from recalkv_vllm.cli import main
from recalkv_vllm.compression.calibration.builtin_text import builtin_documents
from tests.docs.pages import Command, commands
from tests.tiny_models import make_model, tokenizer

__all__ = ["make_model", "tokenizer"]

pytestmark = pytest.mark.slow

#: What pages call the model.
MODELS = {"MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct"}
#: Their files of text.
TEXTS = {"TEXT", "HELD_OUT", "valid.txt", "test.txt", "held_out.txt", "my_text.jsonl"}


def runs(command: Command) -> bool:
    """Not what takes minutes to be of use, or a server: tests/cli and tests/e2e have these."""
    own = command.words[0] == "recalkv" and command.words[1] != "bench"
    return own and "vllm" not in command.words and not command.synopsis


BY_PAGE: dict[str, list[Command]] = {}
for one in filter(runs, commands()):
    BY_PAGE.setdefault(one.page, []).append(one)


@pytest.fixture(scope="module")
def model(make_model) -> Path:
    """As long a context as the pages' own model has."""
    return make_model("llama", max_position_embeddings=8192)


@pytest.fixture(scope="module", autouse=True)
def shared_cache(tmp_path_factory) -> Iterator[None]:
    """One reader of all pages has one cache."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RECALKV_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def checkpoint(model: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("checkpoint") / "OUT"
    assert main(["compress", str(model), "-o", str(out), "--compression", "0.5", "--quiet"]) == 0
    return out


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where that reader is: with texts, and with the checkpoint of an earlier page."""
    text = "\n".join(builtin_documents())
    for name in TEXTS:
        row = json.dumps({"text": text}) + "\n"
        (tmp_path / name).write_text(row if name.endswith(".jsonl") else text)
    shutil.copytree(checkpoint, tmp_path / "OUT")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", BY_PAGE)
def test_commands_of_a_page(page: str, model: Path, folder: Path, capsys) -> None:
    for command in BY_PAGE[page]:
        words = [str(model) if word in MODELS else word for word in command.words[1:]]
        if words[0] == "compress":
            shutil.rmtree(folder / words[words.index("-o") + 1], ignore_errors=True)
        status = main(words)
        printed = capsys.readouterr()
        assert status == 0, f"{command}: {printed.err}"
        if command.output is not None:
            (folder / command.output).write_text(printed.out)
