"""Commands that the pages show: parsed as a shell and then the program would, but not run.

What they do is tested where the features are (``tests/e2e``, ``tests/cli``), and ``examples/`` are
run (``tests/e2e/test_examples.py``).
"""

import re

import pytest

from recalkv_vllm.cli.main import build_parser
from tests.docs.pages import ROOT, commands

COMMANDS = commands()
#: Programs of others. lm_eval reads its tasks from the hub; docker runs nowhere in the tests.
FOREIGN = {"pip", "curl", "lm_eval", "docker", "mkdocs"}
KNOWN = {"recalkv", "vllm", "make", "python", ".venv/bin/python", "sh", *FOREIGN}


def of(program: str):
    """Those of one program, one test each."""
    chosen = [command for command in COMMANDS if command.words[0] == program]
    return pytest.mark.parametrize("command", chosen, ids=str)


def test_programs_are_known():
    assert {command.words[0] for command in COMMANDS} <= KNOWN


@of("recalkv")
def test_recalkv_parses(command, capsys):
    try:
        build_parser().parse_args(command.words[1:])
    except SystemExit as error:
        pytest.fail(f"{command}: {error} {capsys.readouterr().err}")


@of("make")
def test_make_has_the_target(command):
    makefile = (ROOT / "Makefile").read_text()
    for word in command.words[1:]:
        variable = re.match(r"([A-Z_]+)=", word)
        pattern = rf"^{variable[1]} \?= |\$\({variable[1]}\)" if variable else rf"^{word}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"{command}: {word}"


@pytest.mark.parametrize("program", ["python", ".venv/bin/python", "sh"])
def test_scripts_and_modules_are_there(program):
    for command in COMMANDS:
        if command.words[0] != program or command.words[1] == "-c":
            continue
        script = command.words[1]
        if script == "-m":
            name = command.words[2].replace("recalkv_vllm.benchmarks", "benchmarks")
            path = "tests/__init__" if name == "pytest" else name.replace(".", "/")
            script = f"{path}/__main__.py" if (ROOT / path).is_dir() else f"{path}.py"
        assert (ROOT / script).is_file(), command


def test_vllm_serve_has_the_flags():
    """Of vLLM's own parser, which knows our backend too."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers())
    served = [c for c in COMMANDS if c.words[:2] == ("vllm", "serve")]
    assert len(served) > 5
    for command in served:
        options = parser.parse_args(command.words[1:])
        assert options.attention_backend == "recalkv", command
