"""What a run ran on: versions, processor, devices. A figure without these cannot be compared."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import scratchlm
from scratchlm.processes import cores

_LIBRARIES = ("torch", "numpy", "numba", "regex", "triton")


def _output(*command: str) -> str | None:
    """Standard output of a quick command; None where it is missing, slow or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()


def cpu_name() -> str:
    """The processor's name as its maker writes it, or at least its architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() in ("model name", "cpu model") and value.strip():
                return " ".join(value.split())
    if platform.system() == "Darwin" and (name := _output("sysctl", "-n", "machdep.cpu.brand_string")):
        return name
    return platform.processor() or platform.machine() or "unknown"


def git_commit(folder: str | os.PathLike[str]) -> str | None:
    """Commit of the checkout that `folder` is a tracked part of, with ``+changes`` where tracked files differ.

    None outside a checkout, without git, and where the folder merely lies inside somebody else's checkout, as an
    installed package in its environment does.
    """
    git = ("git", "-C", str(folder))
    if not _output(*git, "ls-files", "--error-unmatch", "__init__.py"):
        return None
    commit = _output(*git, "rev-parse", "HEAD")
    if not commit:
        return None
    return commit + (
        "+changes" if _output(*git, "status", "--porcelain", "--untracked-files=no", "--", ".") else ""
    )


def describe_environment(parameters: int | None = None, active: int | None = None) -> dict[str, Any]:
    """Versions and machine as plain JSON values.

    Args:
        parameters: the model's parameter count, kept beside the rest for the report.
        active: how many of them one token meets, where a mixture of experts makes these fewer.

    Returns:
        ``scratchlm``, ``commit`` (None outside a checkout), ``python``, one entry per installed library, ``os``,
        ``cpu`` (name), ``cores`` (usable, logical), ``threads`` (torch's), ``memory_bytes`` (None where unknown),
        ``devices`` (names of accelerators), ``cuda`` (version or None) and, if given, ``parameters`` and
        ``active_parameters``.
    """
    import torch  # here, because it takes seconds

    versions: dict[str, str] = {}
    for library in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[library] = metadata.version(library)
    memory = None
    with suppress(OSError, ValueError, AttributeError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("Apple MPS")
    described: dict[str, Any] = {
        "scratchlm": scratchlm.__version__,
        "commit": git_commit(Path(scratchlm.__file__).parent),
        "python": platform.python_version(),
        **versions,
        "os": platform.platform(),
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory,
        "devices": devices,
        "cuda": torch.version.cuda,
    }
    given = {"parameters": parameters, "active_parameters": active}
    return described | {name: count for name, count in given.items() if count is not None}
