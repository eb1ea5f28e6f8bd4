"""The kernels' tests under compute-sanitizer, on a CUDA device.

python benchmarks/sanitize_kernels.py [--tools memcheck,racecheck,initcheck] [--backend cuda]
    [--json FILE.json]

compute-sanitizer comes with the CUDA toolkit, and as the package nvidia-cuda-sanitizer-api.
PyTorch's caching allocator is off meanwhile: within what it holds, an access beyond a tensor would
not be seen. So is what the tests do to new memory themselves, which would be as much in the tools'
way. The test that captures a step in a CUDA graph is left out: without that allocator nothing can
be captured. Ends with 1 where a tool found anything in the kernels, or a test failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from locallearn.engine.environment import describe_environment
from locallearn.engine.files import write_json

_TOOLS = ("memcheck", "racecheck", "initcheck")
_TESTS = "tests/kernels/test_device_kernels.py"
# See tests/kernels/guarded_memory.py: to initcheck memory that it fills is initialized, and to
# memcheck the margins that it puts around a tensor are within an allocation.
_ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "LOCALLEARN_TESTS_PLAIN_MEMORY": "1"}
_FOUND = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
_FAILED = 99  # what the tool ends with where it found anything


def sanitize(program: str, tool: str, backend: str) -> dict[str, Any]:
    """One tool's run: what it found, whether the tests passed, and how long it took."""
    command = [program, "--tool", tool, "--error-exitcode", str(_FAILED)]
    command += [sys.executable, "-m", "pytest", "-q", "-x", _TESTS]
    command += ["-k", f"{backend} and not captured"]
    environment = os.environ | _ENVIRONMENT
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = [int(a or b) for a, b in _FOUND.findall(done.stdout + done.stderr)]
    if not found:
        raise SystemExit(f"{tool} said nothing of what it found:\n{done.stdout}{done.stderr}")
    return {
        "tool": tool,
        "num_found": sum(found),
        "tests_passed": done.returncode == 0,
        "seconds": round(time.monotonic() - began, 1),
        "output": (done.stdout + done.stderr).splitlines()[-40:] if done.returncode else [],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", default=",".join(_TOOLS))
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--json")
    given = parser.parse_args()
    program = shutil.which("compute-sanitizer")
    if program is None:
        print(
            "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit, and as the "
            "package nvidia-cuda-sanitizer-api."
        )
        return 2
    if not torch.cuda.is_available():
        print("there is no CUDA device on this machine.")
        return 2
    record: dict[str, Any] = {"environment": describe_environment("cuda"), "runs": []}
    for tool in given.tools.split(","):
        run = sanitize(program, tool, given.backend)
        record["runs"].append(run)
        passed = "passed" if run["tests_passed"] else "failed"
        print(f"{tool}: {run['num_found']} found, tests {passed}, {run['seconds']} s")
        print("\n".join(run["output"]))
        if given.json is not None:
            write_json(Path(given.json), record)
    is_clean = all(run["num_found"] == 0 and run["tests_passed"] for run in record["runs"])
    return 0 if is_clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
