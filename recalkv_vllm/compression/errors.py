"""Exceptions of the offline tool that are the user's to resolve."""

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError


class InputError(ValueError):
    """Bad input; the message is one line naming the thing, what was expected and what was found."""


class OutputError(InputError, OSError):
    """What could not be written: no space, no permission, a file that grew too large."""


def check_least(options: object, **least: int) -> None:
    """Raise :class:`InputError` for an attribute (``num_samples=1``) below its least value.

    Attributes are named as the options of the command line that they come from.
    """
    for name, smallest in least.items():
        value = getattr(options, name)
        if value < smallest:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} {value}: expected at least {smallest}")


@contextmanager
def output_errors(target: str) -> Iterator[None]:
    """Turn a failure to write into an :class:`OutputError` that names ``target``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{target}: cannot be written ({error})") from error
