"""What a run's record says of where it ran."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from locallearn._version import __version__

_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "triton",
    "cuda-core",
    "cuda-bindings",
    "schedulefree",
    "numpy",
    "scikit-learn",
    "pillow",
)


def package_versions(*more: str) -> dict[str, str | None]:
    """Package -> installed version, or None: of those that always count, and of ``more``."""
    versions: dict[str, str | None] = {}
    for package in (*_PACKAGES, *more):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def device_name(device: str) -> str:
    """What the device calls itself."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    if device == "cpu":
        try:
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
        except OSError:
            pass
        return platform.processor() or platform.machine()
    return device


def git_commit() -> str | None:
    """The commit of locallearn's own source tree ("+changes" if it differs), or None."""
    package = Path(__file__).resolve().parents[1]
    if package.parent.name != "src":  # installed as a copy, so git here would be someone else's
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(package), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "--", str(package)) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def describe_environment(device: str, *packages: str) -> dict[str, Any]:
    """Versions (of ``packages`` too), device, commit and time, as plain values."""
    return {
        "locallearn": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": package_versions(*packages),
        "platform": platform.platform(),
        "device": device,
        "device_name": device_name(device),
        "num_cpus": os.cpu_count(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
