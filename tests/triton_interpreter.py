"""Triton's interpreter, mended and quicker: what runs it imports this, before it launches any."""

from importlib.metadata import version
from types import SimpleNamespace
from unittest.mock import patch

import triton.language as tl
from triton.runtime import interpreter


def indices_of_one_element() -> None:
    """Triton 3.6's makes an integer of an array of one element, which NumPy 2.4 refuses."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def replace_the_language_once_per_launch() -> None:
    """Triton 3.6 to 3.9 does so in each call of a function of the device, a quarter of all time."""
    call, replace = interpreter.GridExecutor.__call__, interpreter._patch_lang
    everywhere = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def launch(self, *args, **kwargs):
        scope = replace(everywhere)
        try:
            with patch.object(interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope()):
                call(self, *args, **kwargs)
        finally:
            scope.restore()

    interpreter.GridExecutor.__call__ = launch


if version("triton").startswith("3.6."):
    indices_of_one_element()
replace_the_language_once_per_launch()
# Every sum of integers is made once more in 64 bits to see whether 32 are enough. Caches of tests
# are too small for that to show anything.
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
