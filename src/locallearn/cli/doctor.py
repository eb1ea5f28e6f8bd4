"""`locallearn doctor`."""

from __future__ import annotations

import os
import platform

from rich.console import Console
from rich.table import Table


def doctor() -> None:
    """Versions, devices and tools, what will be used, and why."""
    import torch

    from locallearn._version import __version__
    from locallearn.data.dataset import default_data_dir, free_memory_bytes
    from locallearn.engine import choose_device
    from locallearn.engine.environment import device_name, git_commit, package_versions
    from locallearn.kernels import (
        BACKENDS,
        choose_backend,
        cxx_compiler,
        fastest_candidates,
        missing_for,
    )

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("locallearn", f"{__version__} (commit {git_commit() or 'unknown'})")
    table.add_row("Python", f"{platform.python_version()} on {platform.platform()}")
    for package, version in package_versions("onnx", "onnxscript", "onnxruntime").items():
        table.add_row(package, version or "not installed")
    gib = free_memory_bytes() / 2**30
    cores, threads = os.cpu_count(), torch.get_num_threads()
    table.add_row("CPU", f"{device_name('cpu')}; {cores} cores, {threads} threads in use")
    table.add_row("memory", f"{gib:.1f} GiB free")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            total = properties.total_memory / 2**30
            capability = f"{properties.major}.{properties.minor}"
            what = f"{properties.name}, {total:.0f} GiB, compute capability {capability}"
            table.add_row(f"CUDA device {index}", what)
    else:
        built = torch.version.cuda
        why = f"torch is built for CUDA {built}, but sees no GPU" if built else "torch has no CUDA"
        table.add_row("CUDA", f"no ({why})")
    table.add_row("MPS", "yes" if torch.backends.mps.is_available() else "no")
    compiler = cxx_compiler()
    table.add_row("C++ compiler", compiler or "none")
    table.add_row("data directory", str(default_data_dir()))
    Console(highlight=False).print(table)

    device = choose_device("auto")
    why = {
        "cuda": "a CUDA device is there",
        "mps": "no CUDA device is there, but Apple's GPU is",
        "cpu": "neither a CUDA device nor Apple's GPU is there",
    }[device]
    print(f"\n--device auto means {device}: {why}.")
    backend = choose_backend("auto", device)
    where = ", on a run long enough for compiling to pay" if backend == "compiled" else ""
    rivals = fastest_candidates(device)
    if len(rivals) > 1:
        where = f", and in a run the faster of {' and '.join(rivals)}, which it measures"
    print(f"--backend auto means {backend} there{where}.")
    for name in BACKENDS[1:]:
        if missing := missing_for(name, device):
            print(f"--backend {name} can't be used: it {missing}.")
