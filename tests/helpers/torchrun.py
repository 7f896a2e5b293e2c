"""Run a file of this folder on several gloo processes of this machine: by torchrun, or by forks of this process."""

import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import forks
from accelerate.state import AcceleratorState, GradientState, PartialState

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
SECONDS = 300
"""After which a process is killed: one that waits for another that is gone waits for ever."""


def torchrun(worker, *words, processes=2):
    """Run the module `worker` with these words on its command line; returns stdout."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", Path(worker.__file__)]
    done = subprocess.run(
        [sys.executable, *(str(word) for word in (*start, *words))],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        encoding="utf-8",
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-20000:]
    return done.stdout


def forked(worker, *words, processes=2):
    """As :func:`torchrun`, without the seconds in which every process imports torch and transformers again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        starts = [partial(_as_rank, worker, words, rank, processes, port) for rank in range(processes)]
        codes = [forks.wait(child) for child in [forks.start(start, out, err) for start in starts]]
        assert codes == [0] * processes, err.read_text()[-20000:]
        return out.read_text(encoding="utf-8")


def _as_rank(worker, words, rank, processes, port):
    """In a child: what torchrun would do."""
    signal.alarm(SECONDS)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update(ENVIRONMENT, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update({name: str(value) for name, value in places.items()})
    sys.argv = [worker.__file__, *map(str, words)]
    runpy.run_path(worker.__file__, run_name="__main__")
