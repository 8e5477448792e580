"""The one exception whose text is meant for the person at the terminal."""


class UserError(Exception):
    """A request that cannot be carried out: one sentence that says why and what to do.

    The command line prints the sentence alone, without a traceback, and exits with ``code`` (see
    :mod:`convnextv2_kernels.cli.exit_codes`).
    """

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.code)
