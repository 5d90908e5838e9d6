"""The base class of errors that end a command."""


class OperatorError(Exception):
    """A command fails. ``problems`` are for the operator: one sentence each, without secrets."""

    @property
    def problems(self) -> list[str]:
        return [str(self)]
