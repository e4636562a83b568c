"""The machine that a measurement was made on."""

import os
import platform
from pathlib import Path

import torch

__all__ = ["machine"]


def machine(device: str = "cpu") -> dict[str, str]:
    """What measured times depend on: processor or accelerator, threads, load, versions."""
    about = {"cpu": _processor()}
    if device.startswith("cuda"):
        about["gpu"] = torch.cuda.get_device_name(device)
    return about | {
        "threads": str(torch.get_num_threads()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown",
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "backend": os.environ.get("KRON_HF_BACKEND") or "auto",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
