"""Files from anywhere: how each is opened, and what is said where it is refused."""
import contextlib
import os
import stat

from common import UsageError


class Refused(ValueError):
    """The file is not what was asked for; says why."""


@contextlib.contextmanager
def refusing(what, hint=""):
    """Whatever fails within becomes one UsageError: what it was, why in brackets, a hint.

    Foreign and damaged files raise anything.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        if isinstance(error, LookupError):  # its text is a name alone
            reason = f"{type(error).__name__}: {reason}"
        raise UsageError(f"{what} ({reason}){hint}") from None


def one_line(error, most=200):
    """An exception's text, of which a file may have written a part: one line, printable."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:most])


def file_size(path):
    """Bytes of a file. Refused if it is none: opening a pipe would wait for its other end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise Refused("it is not a file")
    return status.st_size


def read_file(path, most, begins=b""):
    """The bytes of a file from anywhere, read once: what is hashed is also what is parsed.

    Refused unless it is a regular file of 1 to `most` bytes that begins with `begins`.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        size = file_size(file.fileno())
        if not 0 < size <= most:
            raise Refused(f"it has {size:,} bytes, not 1 to {most:,}")
        if not file.peek(len(begins)).startswith(begins):
            raise Refused("it begins like another kind of file")
        return file.read(size)


def _without_waiting(path, flags):
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has no pipes there
