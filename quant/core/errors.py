"""The two kinds of failure that a person can act on."""


class InputError(ValueError):
    """Bad arguments or unusable input: one line that says what is wrong and how to fix it; exit code 2."""


class RunError(RuntimeError):
    """A failure after work began: finished blocks stay resumable; exit code 1."""
