"""The one exception a user is meant to read."""


class UserError(Exception):
    """Bad input: what is wrong, where, and what to do about it, in one line.

    The command line prints it as ``scratchlm: error: <message>`` and exits with status 2; a library caller catches it
    like any other exception. Anything else that escapes is a bug of ours and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def first_line(error: BaseException) -> str:
    """What another library's exception says, to be quoted in a message: the first line, 200 characters at most; its type, if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
