"""A program in two processes of one machine, for the tests of training on many."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def launch(folder: Path, program: str) -> Path:
    """Run the program in two processes, with its folder as the argument, and return the folder.

    The environment is that which torchrun makes. `accelerate launch` starts several processes for GPUs, on CPUs only by
    MPI.
    """
    (folder / "program.py").write_text(program)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = dict(os.environ, OMP_NUM_THREADS="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                  ACCELERATE_USE_CPU="true", ORAL4_DEVICE="cpu", LOCAL_WORLD_SIZE="2")  # fmt: skip
    processes = [
        subprocess.Popen([sys.executable, "program.py", str(folder)], cwd=folder, text=True, stderr=subprocess.PIPE,
                         env=dict(shared, RANK=str(rank), LOCAL_RANK=str(rank)))
        for rank in (0, 1)
    ]  # fmt: skip
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return folder
