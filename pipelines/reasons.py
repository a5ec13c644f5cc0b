"""Why a library failed, as far as it fits into a message of ours. Without torch: the engine needs it too."""


def first_line(error: BaseException) -> str:
    """The first line of the error's text, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
