"""All tasks by name."""

from __future__ import annotations

from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.evaluation.ruler.counting import COUNTING_TASKS
from recalkv_vllm.evaluation.ruler.needles import NEEDLE_TASKS, PASSKEY_TASK
from recalkv_vllm.evaluation.ruler.prompt import Task
from recalkv_vllm.evaluation.ruler.tracing import TRACING_TASKS

PASSKEY = "passkey"
RULER_TASKS = {**NEEDLE_TASKS, **TRACING_TASKS, **COUNTING_TASKS}
TASKS = {PASSKEY: PASSKEY_TASK, **RULER_TASKS}


def find_task(name: str) -> Task:
    """A task by its name. Raises :class:`InputError` if there is none."""
    if name not in TASKS:
        raise InputError(f"--tasks {name}: unknown; expected one of {', '.join(TASKS)}")
    return TASKS[name]
