"""The error that a user's mistake ends with."""


class UserError(Exception):
    """A user's mistake, as one line that says what was expected, what was found and what to do.

    Entry points print it as `error: ...` and exit with code 2, without a traceback.
    """
