"""Real models, compressed through the real command line, and engines in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.e2e.prompts import LONG_TEXT, QUESTIONS

BIN = Path(sys.executable).parent
ENGINE = Path(__file__).with_name("engine.py")


@pytest.fixture(scope="session")
def model() -> Path:
    """SmolLM2-135M-Instruct (``make model`` puts it where ``make test`` says)."""
    path = Path(os.environ.get("RECALKV_TEST_MODEL", ".cache/SmolLM2-135M-Instruct")).resolve()
    if not path.is_dir():
        pytest.fail(f"{path}: no such directory; expected the test model, made by: make model")
    return path


def run_recalkv(*args, check=True):
    """Run the ``recalkv`` command; returns the finished process."""
    done = subprocess.run([BIN / "recalkv", *map(str, args)], capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def run_engines(*jobs, **environment):
    """Run engine jobs (see ``engine.py``) one after the other in one process."""
    done = subprocess.run(
        [sys.executable, ENGINE],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def full_rank(model, tmp_path_factory) -> Path:
    """The test model at full rank: every served token must be the stock model's."""
    output = tmp_path_factory.mktemp("full-rank") / "model"
    run_recalkv("compress", model, "-o", output, "--compression", 0)
    return output


@pytest.fixture(scope="session")
def half(model, tmp_path_factory) -> Path:
    """The test model at half its cache, calibrated on little text: any factors will do here."""
    output = tmp_path_factory.mktemp("half") / "model"
    run_recalkv(
        "compress", model, "-o", output, "--compression", 0.5, "--num-samples", 8, "--seq-len", 128
    )
    return output


@pytest.fixture(scope="session")
def prompts(model) -> dict[str, list]:
    """Token ids: ``questions`` as chats, and ``long`` text of some 700 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]
    return {"questions": chats, "long": tokenizer(LONG_TEXT)["input_ids"][:700]}
