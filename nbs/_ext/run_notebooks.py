"""Execute the book's notebooks in parallel into the cache that the book is built from.

Sphinx alone runs them one after another. This runs those whose code, library, records or scale changed, `--jobs` at
a time, the longest first, and keeps how long each took and on what.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from notebook import CACHE, ROOT, load, notebooks, prepare


def device_words() -> str:
    """What the notebooks run on, in words."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} CPU cores"


def as_node(nb: dict):
    """Notebook of plain dictionaries as nbformat's own type."""
    import nbformat

    return nbformat.reads(json.dumps(nb), as_version=4)


def cached(cache, nb: dict) -> dict | None:
    """Facts of the stored execution of a prepared notebook, or None where there is none."""
    try:
        return cache.match_cache_notebook(as_node(nb)).data
    except KeyError:
        return None


def execute(path: str, timeout: int) -> tuple[str, float, str | None, object]:
    """Execute one notebook; give its path, seconds, error and result."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    nb = as_node(prepare(load(Path(path))))
    timeout = nb.metadata.get("mystnb", {}).get("execution_timeout", timeout)
    client = NotebookClient(
        nb,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,  # it would write into the cells' metadata, which the cache's key covers
        resources={"metadata": {"path": str(Path(path).parent)}},
        extra_arguments=["--IPKernelApp.log_level=40"],  # else each kernel warns that it listens on this machine
    )
    started, error = time.perf_counter(), None
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as problem:
        error = str(problem)
    return path, time.perf_counter() - started, error, nb


def main() -> int:
    """Run the notebooks that the cache lacks."""
    from jupyter_cache import get_cache
    from jupyter_cache.base import CacheBundleIn

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one cell")
    args = parser.parse_args()
    cache = get_cache(str(CACHE))
    todo = []
    paths = sorted(notebooks(), key=lambda p: -p.stat().st_size)
    for path in paths:
        if cached(cache, prepare(load(path))) is None:
            todo.append(str(path))
    print(
        f"{len(paths) - len(todo)} of {len(paths)} notebooks are in the cache; executing {len(todo)}, {args.jobs} at a time",
        flush=True,
    )
    if not todo:
        return 0
    threads = str(max(1, (os.cpu_count() or 1) // max(1, args.jobs)))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, threads)
    os.environ.pop("MPLBACKEND", None)  # a backend of the caller would keep figures out of the pages
    import torch

    facts = {
        "device": device_words(),
        "scale": os.environ.get("ORAL4_SCALE", "mini"),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}",
        "date": datetime.date.today().isoformat(),
    }
    failed, started = [], time.time()
    with ProcessPoolExecutor(args.jobs) as pool:
        for future in as_completed([pool.submit(execute, path, args.timeout) for path in todo]):
            path, seconds, error, nb = future.result()
            print(f"{'FAIL' if error else 'ok  '} {seconds:6.1f} s  {Path(path).relative_to(ROOT)}", flush=True)
            if error:
                failed.append(path)
                print(error, file=sys.stderr, flush=True)
            else:
                bundle = CacheBundleIn(nb, path, data=facts | {"execution_seconds": seconds, "seconds": seconds})
                cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
    print(f"{time.time() - started:.1f} s in all")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
