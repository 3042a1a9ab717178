"""The exceptions that end a program with a message instead of a traceback."""


class UserError(Exception):
    """Raised when a path, a value or a line of data that the user gave cannot be used.

    The message is a single line that says what was expected, what was found and what to do. Entry points print it as
    `error: ...` and exit with code 2, without a traceback.

    Attributes:
        leaves_threads: Whether threads may still be running or hanging, for which a normal exit would wait.
    """

    leaves_threads = False


class RunStopped(Exception):
    """Raised if a run stops before its end because of a signal or its time limit, after it has been saved.

    The message says what the workdir holds and how to resume. Entry points print it and exit with `exit_code`.
    """

    def __init__(self, message: str, exit_code: int):
        """Keeps the message and the exit code."""
        super().__init__(message)
        self.exit_code = exit_code
