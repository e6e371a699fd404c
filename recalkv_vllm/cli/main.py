"""Parsing, output and errors, common to all sub-commands."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from recalkv_vllm.cli import (
    bench_kernel,
    bench_offline,
    bench_serve,
    compress,
    env,
    evaluate,
    explore,
    inspect,
    plan,
    write_report,
)
from recalkv_vllm.version import __version__

BAD_INPUT = 2
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Reports a bad command line like any other error, in one line."""

    def error(self, message: str) -> NoReturn:
        sys.exit(report(message))


class StderrHandler(logging.Handler):
    """Writes to what ``sys.stderr`` is at the time: a bar puts there what keeps lines above it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def report(message: str) -> int:
    """Print an error as one line on stderr; the exit status for bad input."""
    print(f"recalkv: error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands; each sets ``run`` to its function."""
    parser = Parser(prog="recalkv", description="Low-rank KV-cache compression for vLLM.")
    parser.add_argument("--version", action="version", version=f"recalkv {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    bench = commands.add_parser(
        "bench",
        help="measure speed against stock vLLM",
        description="Measure speed against stock vLLM.",
    )
    benchmarks = bench.add_subparsers(metavar="BENCHMARK", required=True)
    modules = [
        (module, commands)
        for module in (compress, env, evaluate, explore, inspect, plan, write_report)
    ]
    modules += [(module, benchmarks) for module in (bench_kernel, bench_offline, bench_serve)]
    for module, group in modules:
        command = module.add_parser(group)
        command.add_argument(
            "--json", action="store_true", help="print one JSON object to stdout, and nothing else"
        )
        if module not in (env, inspect, plan, write_report):
            command.add_argument(
                "--quiet", action="store_true", help="no progress on stderr, only warnings"
            )
        command.set_defaults(run=module.run, show=module.show, quiet=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    options = build_parser().parse_args(argv)
    handler = StderrHandler()
    handler.setFormatter(logging.Formatter("recalkv: %(message)s"))
    logger = logging.getLogger("recalkv_vllm")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.WARNING if options.quiet else logging.INFO)
    # Handled like Ctrl-C: partial output is removed and servers stop. By default, neither happens.
    on_main_thread = threading.current_thread() is threading.main_thread()
    before = on_main_thread and signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = options.run(options)
    except ValueError as error:
        # Imported late: torch takes seconds to load, and may be what `recalkv env` finds broken.
        from recalkv_vllm.checkpoint import CheckpointError
        from recalkv_vllm.compression.errors import InputError

        if not isinstance(error, CheckpointError | InputError):
            raise
        return report(str(error))
    except KeyboardInterrupt:
        print("recalkv: interrupted", file=sys.stderr)
        return INTERRUPTED
    finally:
        if on_main_thread:
            signal.signal(signal.SIGTERM, before)
        logger.removeHandler(handler)
        logger.setLevel(level)
    if options.json:
        print(json.dumps(result))
    else:
        options.show(result)
    return 0
