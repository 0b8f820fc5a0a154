"""The one error for a user's mistake."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line: the invariant, what was received, the remedy. The command line prints
    it without a traceback; any other exception is our own and keeps its traceback.
    """
