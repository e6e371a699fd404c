"""The local tasks for the lm-evaluation-harness have right answers; lm-eval itself runs them."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from recalkv_vllm.benchmarks.lm_eval_tasks import ARITHMETIC, CHOICES, KINDS, write_tasks


def rows(directory, task):
    return [json.loads(line) for line in (directory / f"{task}.jsonl").read_text().splitlines()]


def test_answers_are_right(tmp_path):
    write_tasks(tmp_path / "new", items=40)
    for row in rows(tmp_path / "new", ARITHMETIC):
        *examples, asked = row["question"].splitlines()
        sums = [*examples, f"{asked} {row['answer']}"]
        assert len(sums) == 4
        for a, b, total in (re.fullmatch(r"(\d) \+ (\d) = (\d+)", line).groups() for line in sums):
            assert int(a) + int(b) == int(total)
    for row in rows(tmp_path / "new", CHOICES):
        kind = re.findall(r"the (\w+) is:", row["question"])[-1]
        right = [i for i, word in enumerate(row["choices"]) if word in KINDS[kind]]
        assert right == [row["answer"]]
        assert ", ".join(row["choices"]) in row["question"].splitlines()[-1]
    write_tasks(tmp_path / "again", items=40)
    assert rows(tmp_path / "new", CHOICES) == rows(tmp_path / "again", CHOICES)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_lm_eval_runs_them(tiny, tmp_path):
    write_tasks(tmp_path, items=4)
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={tiny}"),
        *("--tasks", f"{ARITHMETIC},{CHOICES}", "--include_path", tmp_path),
        *("--output_path", tmp_path / "results"),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    subprocess.run(list(map(str, command)), check=True, env=environment, cwd=tmp_path)
    (written,) = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    assert 0 <= results[ARITHMETIC]["exact_match,answer"] <= 1
    assert 0 <= results[CHOICES]["acc,none"] <= 1
