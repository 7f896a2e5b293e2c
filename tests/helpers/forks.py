"""Child processes that are forked from this one, so that torch and transformers are not imported again."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def start(function: Callable[[], object], out: Path, err: Path | None = None) -> int:
    """Run a function in a child whose output is added to files; returns the child's process id.

    The child ends with the code of a SystemExit, with 1 after any other exception, else with 0.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        for stream, path in ((1, out), (2, err or out)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", 1, encoding="utf-8") for stream in (1, 2))
        function()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """The exit code of a child once it has ended; the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
