"""``recalkv eval`` with ``--metric ruler`` and ``passkey``: options, run and table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_ruler_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the two metrics."""
    add = parser.add_argument
    add(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="ruler: tasks, such as niah_single_1, vt or cwe (default: all)",
    )
    add(
        "--lengths",
        nargs="+",
        type=int,
        default=[1024, 2048],
        metavar="N",
        help="ruler, passkey: tokens of prompt and answer together",
    )
    add(
        "--depths",
        nargs="+",
        type=float,
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        metavar="D",
        help="ruler, passkey: where in the text the needle is, from 0 (start) to 1 (end)",
    )
    add(
        "--samples",
        type=int,
        default=2,
        metavar="N",
        help="ruler, passkey: prompts per task, length and depth",
    )
    add("--seed", type=int, default=0, metavar="N", help="of ruler, passkey and --dataset self")
    add(
        "--answers",
        type=Path,
        metavar="FILE.jsonl",
        help="ruler, passkey: add every answer to this file as it comes; the same command again "
        "asks only for those that are not in it",
    )


def run_ruler(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Ask all tasks of one model, and of ``--base`` if it is given; the JSON object."""
    from recalkv_vllm.checkpoint import read_hf_config
    from recalkv_vllm.cli.ruler_plot import plot_depths
    from recalkv_vllm.compression.base_model.find import find_model
    from recalkv_vllm.compression.base_model.model import BaseModel
    from recalkv_vllm.compression.errors import InputError
    from recalkv_vllm.evaluation.context import longest_context
    from recalkv_vllm.evaluation.engines import load_engine
    from recalkv_vllm.evaluation.ruler.answers import AnswerFile
    from recalkv_vllm.evaluation.ruler.grid import Grid, make_prompts, score_model, summarize
    from recalkv_vllm.evaluation.ruler.tasks import PASSKEY, RULER_TASKS, find_task

    tasks = [PASSKEY] if options.metric == PASSKEY else options.tasks or list(RULER_TASKS)
    grid = Grid(tasks, options.lengths, options.depths, options.samples, options.seed)
    grid.check(longest_context(read_hf_config(directory)))
    if options.plot is not None and not any(find_task(task).at_depth for task in tasks):
        raise InputError(f"--plot: expected a task with one needle, found {', '.join(tasks)}")
    engine = load_engine(options.engine, options.dtype)
    models = {"score": directory}
    if options.base is not None:
        models["base_score"] = find_model(options.base)
    # Read before any work: the file may be another one.
    by = " ".join(filter(None, (options.engine, options.dtype)))
    files = {name: AnswerFile(options.answers, model, by) for name, model in models.items()}
    tokenizer = BaseModel(directory).tokenizer()
    prompts = make_prompts(grid, tokenizer)
    scores = {
        name: score_model(engine, model, tokenizer, prompts, files[name])
        for name, model in models.items()
    }
    base = {} if options.base is None else {"base": options.base}
    result = {**base, "seed": options.seed, **summarize(scores)}
    if options.plot is not None:
        plot_depths({"model": options.model, **result}, options.plot)
    return result


def show_ruler(result: dict[str, Any]) -> None:
    """Print scores by task and length."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    with_base = "base" in result
    table = Table(title=f"{result['model']}: references found", box=SIMPLE_HEAD, pad_edge=False)
    columns = ["task", "tokens", "prompts", *["base", "model", "retained"][not with_base :]]
    for column in columns[: None if with_base else -1]:
        table.add_column(column, justify="left" if column == "task" else "right")
    for row in result["rows"]:
        cells = [row["task"], f"{row['length']:,}", str(row["prompts"])]
        if with_base:
            cells.append(f"{row['base_score']:.0%}")
        cells.append(f"{row['score']:.0%}")
        if with_base:
            retained = row["retained"]
            cells.append("base below 50%" if retained is None else _share(row))
        table.add_row(*cells)
    Console().print(table)
    if "retained" in result:
        print(f"retained where the base model scores 50% or more: {_share(result)}")


def _share(row: dict[str, Any]) -> str:
    """What is retained, and its standard error."""
    error = row["retained_error"]
    return f"{row['retained']:.0%}" + ("" if error is None else f" ± {error:.0%}")
