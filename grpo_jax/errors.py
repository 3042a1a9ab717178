"""The exception that reports a user's mistake."""


class UserError(Exception):
    """Raised when a path, a value or a line of data that the user gave cannot be used.

    The message is a single line that says what was expected, what was found and what to do. Entry points print it as
    `error: ...` and exit with code 2, without a traceback.

    Attributes:
        leaves_threads: Whether threads may still be at work, or hang, for which an orderly exit would wait.
    """

    leaves_threads = False
