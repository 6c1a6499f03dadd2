"""Expected mistakes, in one line: what is wrong (file or value), what was expected, and how to go on.

Library code raises ``HamletError`` (or a subclass) for whatever a person, a file or a machine may get wrong. Every
command line runs its work inside ``one_line``, the one place that turns such errors into a line and an exit code.
"""

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unicodedata import category

ADVICE = {
    errno.ENOSPC: "the disk is full: free some space, then give the same command again",
    errno.EACCES: "no permission: choose another place, or change the permissions",
    errno.EPERM: "not permitted: choose another place, or change the permissions",
    errno.EROFS: "the file system is read-only: choose another place",
}


class HamletError(ValueError):
    """An expected mistake; its message names the file or value, what was expected and the way out."""


class DataError(HamletError):
    """Data that cannot be used as they are; the message names the file and the way out."""


def printable(text: str | os.PathLike) -> str:
    """A text or path on one line: control characters, which a terminal obeys, and ends of lines are written out."""
    odd = ("Cc", "Cs", "Zl", "Zp")  # a screenshot's name may well hold a space that is none of ASCII's
    return "".join(c.encode("unicode_escape").decode() if category(c) in odd else c for c in os.fspath(text))


@contextmanager
def one_line(arguments: Sequence[str] | None = None) -> Iterator[None]:
    """Run a command's work: expected errors end the process with one line on stderr and exit code 1.

    ``--traceback`` among the arguments (default: the process's) shows the whole error instead. A reader that goes
    away (``| head``) ends the process quietly; Ctrl-C ends it with 130.
    """
    if "--traceback" in (sys.argv if arguments is None else arguments):
        yield
        return
    if hasattr(sys.stdout, "reconfigure"):  # a name of a file may hold what the terminal has no letter for
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # the interpreter flushes once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except MemoryError:
        sys.exit("error: not enough memory; ask for less at a time (--batch-size, --jobs) or use a larger machine")
    except HamletError as error:
        sys.exit(f"error: {printable(str(error).strip())}")
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        sys.exit(f"error: {printable(f'{place}{ADVICE.get(error.errno, error.strerror or error)}')}")
