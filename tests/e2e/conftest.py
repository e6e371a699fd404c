"""Real models, compressed through the real command line, and engines in processes of their own."""

import atexit
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from recalkv_vllm.compression.options import CompressOptions
from recalkv_vllm.compression.pipeline import compress
from tests.e2e.architectures import CONFIGS, SIZES, save_random_model
from tests.e2e.more_architectures import MORE_CONFIGS
from tests.e2e.prompts import LONG_TEXT, QUESTIONS
from tests.tiny_models import train_tokenizer

BIN = Path(sys.executable).parent
ENGINE = Path(__file__).with_name("engine.py")
EXAMPLES = Path(__file__).parents[2] / "examples"


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


def run_example(*command, **options) -> str:
    """Run a file of ``examples/`` as a user would; what it prints."""
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, **options
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


class EngineProcess:
    """A process of ``engine.py``; what it logs goes to a file, of which failures show the end."""

    def __init__(self, *options, **environment):
        self.log = tempfile.TemporaryFile("a+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, ENGINE, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **environment},
        )

    def run(self, jobs):
        """Results of jobs; asserts that the process did not die of them."""
        self.log.seek(0, os.SEEK_END)
        began = self.log.tell()
        self.process.stdin.write(json.dumps(jobs) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.process.wait()  # it still writes why
        self.log.seek(began)
        assert answer, self.log.read()[-4000:]
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


@cache
def shared_engines(*options) -> EngineProcess:
    """The process of all jobs that need no environment of their own; vLLM is imported once."""
    engines = EngineProcess(*options)
    atexit.register(engines.close)
    return engines


def imports_numba(engine):
    transfer = engine.get("kv_transfer_config") or {}
    offloading = transfer.get("kv_connector_extra_config", {}).get("spec_name")
    return "speculative_config" in engine or offloading == "ColdTierSpec"


def run_engines(*jobs, **environment):
    """Run engine jobs (see ``engine.py``) one after the other in one process."""
    if environment:
        engines = EngineProcess(**environment)
    elif any(imports_numba(job["engine"]) for job in jobs):
        # vLLM 0.32 starts no engine where Numba was imported, as by its n-gram proposer.
        engines = shared_engines("--fork")
    else:
        engines = shared_engines()
    try:
        return engines.run(jobs)
    except AssertionError:
        shared_engines.cache_clear()
        raise
    finally:
        if environment:
            engines.close()


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
        "compress", model, "-o", output, "--compression", 0.5, "--latent-dtype", "bf16",
        "--dataset", "builtin", "--num-samples", 8, "--seq-len", 128,
    )  # fmt: skip
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


@dataclass(frozen=True)
class SmallPrompts:
    """Random token ids for small models, and engine jobs that continue them."""

    #: The first is prefilled in chunks, with context, and longer than every window.
    ids: list[list[int]]

    def job(self, model: Path, *batches, **engine):
        """A job of ``engine.py``: a greedy continuation, or the ``batches`` given."""
        sizes = {
            "max_num_batched_tokens": 128,
            "max_model_len": 512,
            "block_size": 32,
            "kv_cache_memory_bytes": 64 << 20,
        }
        greedy = {"prompts": self.ids, "sampling": {"max_tokens": 24, "ignore_eos": True}}
        return {"engine": {**sizes, "model": str(model), **engine}, "batches": batches or [greedy]}


@pytest.fixture(scope="session")
def small_prompts() -> SmallPrompts:
    draw = random.Random(0)
    return SmallPrompts(
        [[draw.randrange(3, SIZES["vocab_size"]) for _ in range(n)] for n in (300, 7, 31, 50)]
    )


@pytest.fixture(scope="session")
def make_small(tmp_path_factory):
    """``make_small(name, seed)``: a random model of ``architectures.CONFIGS``, with a tokenizer."""
    directory, tokenizer = tmp_path_factory.mktemp("small"), train_tokenizer()

    def make(name: str, seed: int = 0) -> Path:
        path = directory / (f"{name}-{seed}" if seed else name)
        if not path.is_dir():
            save_random_model({**CONFIGS, **MORE_CONFIGS}[name], path, seed)
            tokenizer.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def small(make_small) -> Path:
    return make_small("llama3-rope")


@pytest.fixture(scope="session")
def compressed(tmp_path_factory):
    """``compressed(model, **options)``: at full rank, in groups that calibration finds.

    Groups of two heads: heads move.
    """
    made: dict[tuple, Path] = {}

    def make(model: Path, **options) -> Path:
        key = (model, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("compressed") / model.name
            settings = {
                "compression": 0.0,
                "method": "recalkv",
                "k_group_size": 2,
                "datasets": ("builtin",),
                "num_samples": 2,
                "seq_len": 64,
                **options,
            }
            compress(CompressOptions(str(model), made[key], **settings))
        return made[key]

    return make


@pytest.fixture(scope="session")
def bands(compressed):
    """``bands(model)``: compressed to bands of several bit widths, as ``kfac`` does by default."""
    settings = {"compression": 0.8, "target": "none", "k_group_size": None, "num_samples": 16}
    return partial(compressed, method="kfac", **settings)
