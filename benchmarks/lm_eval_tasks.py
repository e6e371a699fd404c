"""Two small tasks for the lm-evaluation-harness, made here: nothing is downloaded.

``python -m recalkv_vllm.benchmarks.lm_eval_tasks DIR`` writes them; ``docs/accuracy.md`` has the
command that runs them. They prove that the road works, and compare models; they are no benchmark.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

ARITHMETIC, CHOICES = "recalkv_arithmetic", "recalkv_choices"
ITEMS = 50
#: A kind and its members, of which a question shows one, among members of others.
KINDS = {
    "animal": ("dog", "horse", "rabbit", "tiger", "monkey", "sheep"),
    "color": ("red", "blue", "green", "yellow", "purple", "brown"),
    "fruit": ("apple", "banana", "cherry", "grape", "lemon", "peach"),
    "number": ("three", "seven", "eleven", "twenty", "forty", "ninety"),
    "country": ("France", "Japan", "Brazil", "Egypt", "Canada", "India"),
    "tool": ("hammer", "saw", "drill", "wrench", "shovel", "axe"),
}
COMMON = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
GENERATED = """\
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n", ","]
  max_gen_toks: 8
  do_sample: false
filter_list:
  - name: answer
    filter:
      - function: remove_whitespace
      - function: take_first
metric_list:
  - metric: exact_match
"""
CHOSEN = """\
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
"""


def arithmetic(rng: random.Random) -> dict[str, Any]:
    """A sum of two numbers below ten, after three worked examples."""
    pairs = [(rng.randrange(1, 10), rng.randrange(1, 10)) for _ in range(4)]
    *examples, (a, b) = pairs
    shown = "".join(f"{x} + {y} = {x + y}\n" for x, y in examples)
    return {"question": f"{shown}{a} + {b} =", "answer": str(a + b)}


def choice(rng: random.Random) -> dict[str, Any]:
    """Which of four words is of a kind, after two worked examples."""
    asked = rng.sample(sorted(KINDS), 3)
    lines = []
    for kind in asked:
        others = rng.sample([name for name in sorted(KINDS) if name != kind], 3)
        words = [rng.choice(KINDS[name]) for name in (kind, *others)]
        answer = words[0]
        rng.shuffle(words)
        lines.append((f"Of {', '.join(words)}, the {kind} is:", words, answer))
    *examples, (question, words, answer) = lines
    shown = "".join(f"{text} {word}\n" for text, _, word in examples)
    return {"question": shown + question, "choices": words, "answer": words.index(answer)}


def write_tasks(directory: Path, items: int = ITEMS, seed: int = 0) -> None:
    """Write a ``.yaml`` and a ``.jsonl`` for each task.

    Args:
        directory: made if it is not there; the tasks name its absolute path.
        items: questions of each task.
        seed: of the questions.
    """
    directory.mkdir(parents=True, exist_ok=True)
    kinds = {ARITHMETIC: (arithmetic, GENERATED), CHOICES: (choice, CHOSEN)}
    for task, (make, output) in kinds.items():
        rng = random.Random(f"{task} {seed}")
        data = directory.absolute() / f"{task}.jsonl"
        rows = [json.dumps(make(rng)) + "\n" for _ in range(items)]
        data.write_text("".join(rows), encoding="utf-8")
        text = COMMON.format(task=task, data=json.dumps(str(data))) + output
        (directory / f"{task}.yaml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", metavar="DIR", type=Path, help="to write the tasks to")
    write_tasks(parser.parse_args().directory)
