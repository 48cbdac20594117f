"""The two kinds of failure that a person can act on."""


class _LinesError(Exception):
    """Says what is wrong: an argument for each mistake, and each of them becomes a line of its own, whatever it holds."""

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class InputError(_LinesError, ValueError):
    """Bad arguments or unusable input: what is wrong and how to fix it, a line for each mistake; exit code 2."""


class RunError(_LinesError, RuntimeError):
    """A failure after work began: finished blocks stay resumable; exit code 1."""


def first_line(error: BaseException) -> str:
    """The first mistake that an error names, for a place with room for one; its type where it says nothing."""
    lines = error.args if isinstance(error, _LinesError) else ()
    return str(lines[0] if lines else error) or type(error).__name__
