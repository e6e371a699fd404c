"""``--help`` of every command: readable, with the defaults that say something."""

import argparse

import pytest

from recalkv_vllm.cli.main import build_parser


def parsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser and those of all sub-commands, by the words that select them."""
    found = {parser.prog: parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found.update(parsers(command))
    return found


PARSERS = parsers(build_parser())


def test_every_command_is_looked_at():
    assert set(PARSERS) == {
        "recalkv",
        "recalkv bench",
        "recalkv bench kernel",
        "recalkv bench offline",
        "recalkv bench serve",
        "recalkv compress",
        "recalkv env",
        "recalkv eval",
        "recalkv explore",
        "recalkv inspect",
        "recalkv plan",
        "recalkv report",
    }


@pytest.mark.parametrize("command", sorted(PARSERS))
def test_everything_is_explained(command):
    parser = PARSERS[command]
    text = parser.format_help()
    assert parser.description
    assert not any(noise in text for noise in ("None", "False", "['", "%("))
    assert all(action.help for action in parser._actions if action.option_strings)


def test_defaults_are_shown():
    text = " ".join(PARSERS["recalkv bench kernel"].format_help().split())
    assert "(default: 0.5 0.75)" in text
    assert "(default: kfac)" in " ".join(PARSERS["recalkv compress"].format_help().split())
