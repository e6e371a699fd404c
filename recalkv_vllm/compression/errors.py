"""The one exception of the offline tool that is the user's to resolve."""


class InputError(ValueError):
    """Bad input; the message is one line naming the thing, what was expected and what was found."""
