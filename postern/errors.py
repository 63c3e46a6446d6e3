"""Errors that every room may raise: something that this machine lacks."""


class Unavailable(RuntimeError):
    """This machine lacks something that was asked for: a device, an extra, a compiler, a data set.

    A claim that raises it is reported as *not run*, never as failed and never as holding.
    """


class MissingExtra(Unavailable, ImportError):
    """A part needs a package that is not installed.

    Args:
        extra: name of the extra that brings it, as in ``pip install postern[extra]``.
        what: what needs it, for the reader ("The AttentionInterface registration").
    """

    def __init__(self, extra: str, what: str) -> None:
        super().__init__(f"{what} needs the extra {extra!r}: pip install 'postern[{extra}]'")
        self.extra = extra
