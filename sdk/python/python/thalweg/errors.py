"""What goes wrong, as exceptions whose messages say what to do.

All of them are `ThalwegError`. Where Python has an exception of the same meaning they are that one too, so that
`except TimeoutError` or `except ValueError` work as well.
"""

from __future__ import annotations


class ThalwegError(Exception):
    """Anything that Thalweg raises."""


class ConnectError(ThalwegError, ConnectionError):
    """No NATS server answers at the URL, or the URL cannot be used."""


class TimedOutError(ThalwegError, TimeoutError):
    """Somebody was waited for in vain; the message names whom."""


class RefusedError(ThalwegError):
    """A component of the service refused.

    `code` is the stable code of the error (`job_failed`, `lease_lost`, `spec_mismatch`, ...; docs/protocol.md lists
    them). Programs match on it; texts may change.
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(f"{message} [{code}]")
        self.message = message
        self.code = code

    def __reduce__(self) -> tuple[type[RefusedError], tuple[str, str]]:
        return type(self), (self.message, self.code)


class BadInputError(ThalwegError, ValueError):
    """An argument that cannot be used: another type, an empty tree, a name that is too long."""


class ShapeError(BadInputError):
    """A tensor has another shape or type than in the rounds before."""


class UnknownTensorError(BadInputError):
    """The job has no tensor of this name."""


class MissingTensorError(BadInputError):
    """A tensor of the job is missing, so that the round could never end."""


class MissingGradientError(ThalwegError):
    """Some workers have a gradient for a parameter and others have none."""


class AlreadyPushedError(ThalwegError):
    """A tensor was pushed twice in one round."""


class AlreadyPulledError(ThalwegError):
    """A tensor was pulled twice in one round."""


class FileError(ThalwegError, OSError):
    """A snapshot's file cannot be read or written."""


class LeftError(ThalwegError):
    """The worker has left its job, or `thalweg.init()` was not called."""


class ForkedError(ThalwegError):
    """The object belongs to the process that this one was forked from."""


class ServiceError(ThalwegError):
    """`thalweg.up()` could not start or stop the service."""
