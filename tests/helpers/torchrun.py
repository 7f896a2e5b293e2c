"""Start a file of this folder on several gloo processes of this machine."""

import os
import subprocess
import sys
from pathlib import Path


def torchrun(worker, *words, processes=2):
    """Run the module `worker` with these words on its command line; returns stdout."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", Path(worker.__file__)]
    done = subprocess.run(
        [sys.executable, *(str(word) for word in (*start, *words))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-20000:]
    return done.stdout
