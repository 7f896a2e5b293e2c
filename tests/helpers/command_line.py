"""Runs commands as a user would, in this process or in one of its own."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple
from unittest.mock import patch

from aimmerging.cli import main


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def command(*words, code=0) -> Result:
    """Run the command in this process; a defect (any other exception than the ones `main` turns into a code) is raised.

    With `code`, the exit code it must have; None for any.
    """
    out, err = io.StringIO(), io.StringIO()
    with patch.object(sys, "argv", ["aimmerging", *map(str, words)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
            found = 0
        except SystemExit as end:
            found = end.code if isinstance(end.code, int) else int(end.code is not None)
    result = Result(found, out.getvalue(), err.getvalue())
    assert code in (None, found), result
    return result


def refused(*words) -> str:
    """Run a command that is the user's mistake, and return its message."""
    result = command(*words, code=2)
    assert result.out == ""
    assert "Traceback" not in result.err
    return result.err


def process(*words, **options) -> Result:
    """Run the command in a process of its own."""
    line = [sys.executable, "-m", "aimmerging", *map(str, words)]
    done = subprocess.run(line, capture_output=True, encoding="utf-8", timeout=300, check=False, **options)
    return Result(done.returncode, done.stdout, done.stderr)
