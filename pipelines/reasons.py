"""Why a library failed, in one line for an error message. No torch here: the engine needs it too."""


def first_line(error: BaseException) -> str:
    """The first line of the error's text, or its class name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
