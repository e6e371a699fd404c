"""How a configuration is refused."""


class ServingError(SystemExit, ValueError):
    """A configuration that we refuse.

    A ``ValueError`` for programs that catch it; a ``SystemExit`` so that ``vllm serve`` ends with
    the message alone and a non-zero status instead of a traceback.
    """

    def __str__(self) -> str:
        return str(self.code)
