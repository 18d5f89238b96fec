"""The one error that is for people: bad input, told in one line, without a traceback."""


def one_line(text: str) -> str:
    """`text` as one printable line: line breaks become spaces, other control characters and undecodable bytes escapes.

    File names come from downloads and cameras: one with a line break, a terminal escape or bytes that are not UTF-8
    must neither break the line nor crash `print`.
    """
    joined = " ".join(line.strip() for line in text.splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in joined)


class InputError(ValueError):
    """Bad input given by the user, not a defect of the program.

    Its message is one line that says what was given, what is possible and what to write instead. The command line
    prints `error: MESSAGE` and exits with code 2; in Python it is a `ValueError` like any other.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))
