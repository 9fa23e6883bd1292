"""What this machine computes with: device, precision, threads, and its own rate of matrix products."""

from __future__ import annotations

import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from pipelines.core import artifacts, environment
from pipelines.core.errors import ParamsError
from pipelines.core.params.compute import ComputeParams

QUICK = frozenset({"avx512f", "avx512_bf16", "amx_bf16", "bf16"})  # flags of a processor that products of bf16 go by
FASTER = 1.25  # bf16 must beat fp32 by this factor to be worth its rounding
PRODUCT_SECONDS = 0.1  # that a product may take by which the machine's rate is measured


@dataclass(frozen=True)
class Hardware:
    """`device` as torch names it; `precision` is `fp32` or `bf16`; `threads` of one process."""

    device: str
    precision: str
    threads: int


def choose(compute: ComputeParams, root: Path, processes: int = 1) -> Hardware:
    """Resolve `auto` and 0 of the `compute` section on this machine, and set the threads of what is imported later.

    `processes` is how many of the stage run on this machine; they share its cores.

    The choice between bf16 and fp32 is measured once for each kind of processor and kept in `.sluice/`, so that
    a stage that is run again, or resumed, computes with the same numbers.

    Raises:
        ParamsError: a device was asked for that this machine has not.
    """
    has_cuda = compute.device != "cpu" and _cuda()
    if compute.device == "cuda" and not has_cuda:
        raise ParamsError("compute.device: cuda was asked for, but torch finds no CUDA device here (auto or cpu)")
    threads = compute.threads or max(1, cores() // processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when torch or numpy is imported, by the stages that do
    device = "cuda" if has_cuda else "cpu"
    precision = compute.precision if compute.precision != "auto" else _measured_precision(root, device)
    return Hardware(device, precision, threads)


def cores() -> int:
    """Cores that this process may use: those it is bound to, or what the quota of its container comes to, if less."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(Path("/sys/fs/cgroup"))
    return bound if quota is None else min(bound, max(1, math.ceil(quota)))


def _quota(group: Path) -> float | None:
    """Cores' worth of time that a control group (version 2, or 1) gives; None without a limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        if all((group / name).exists() for name in names):
            quota, period = " ".join((group / name).read_text(encoding="utf-8") for name in names).split()
            return int(quota) / int(period) if quota.isdigit() else None
    return None


def _cuda() -> bool:
    """Whether torch can use a GPU; it is asked, and imported, only where there is a driver."""
    if not Path("/dev/nvidiactl").exists():
        return False
    import torch

    return torch.cuda.is_available()


def matmul_rate(device: str, precision: str, size: int = 2048, repeats: int = 8) -> float:
    """FLOP/s of a square matrix product: the best of `repeats`, so that a busy neighbour counts least.

    The matrices have `size` rows, or fewer where their product would take longer than `PRODUCT_SECONDS`: one in bf16
    takes a processor that has none of them a minute.
    """
    rows = min(size, 256)
    while rows < size and 8 * _product_seconds(device, precision, rows, repeats=1) <= PRODUCT_SECONDS:
        rows = min(2 * rows, size)
    return 2 * rows**3 / _product_seconds(device, precision, rows, repeats)


def _product_seconds(device: str, precision: str, rows: int, repeats: int) -> float:
    import torch

    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    left = torch.ones(rows, rows, dtype=kind, device=device)
    right = torch.ones(rows, rows, dtype=kind, device=device)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.mm(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


class Rates:
    """The machine's matrix-product rate, sampled in turns with the steps of some work, as neighbours come and go."""

    SAMPLES = 8  # in a run
    SHARE = 0.1  # of the work's own time that sampling may take: less of a run of seconds

    def __init__(self, device: str, precision: str, steps: int, processes: int = 1) -> None:
        """`processes`: how many share the work, each with threads, or a device, as this one has."""
        self.device, self.precision, self.every = device, precision, max(1, steps // self.SAMPLES)
        self.processes = processes
        self.found: list[float] = []  # FLOP/s
        self._worked, self._took = 0.0, 0.0  # seconds, at the last sample

    def sample(self, step: int, worked: float) -> None:
        """Take a sample if it is time: before step `step`, after `worked` seconds of work."""
        due = step % self.every == 0 and self._took <= self.SHARE * (worked - self._worked)
        if due or not self.found:
            start = time.perf_counter()
            self.found.append(matmul_rate(self.device, self.precision, repeats=3))
            self._worked, self._took = worked, time.perf_counter() - start

    def mean(self) -> float | None:
        """FLOP/s of all processes over the samples; None without one, as of a run resumed behind its last step."""
        return self.processes * sum(self.found) / len(self.found) if self.found else None


def processor() -> str:
    """The processor's model name as the kernel tells it, or `unknown`, and which of `QUICK` it has.

    Hosts of a cloud give processors of several generations one name, and move a machine from one to another.
    """
    place = Path("/proc/cpuinfo")
    lines = place.read_text(encoding="utf-8").splitlines() if place.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return ", ".join([name, *sorted(QUICK & cpu_flags())])


def cpu_flags() -> set[str]:
    """The processor's feature flags as Linux lists them; empty elsewhere."""
    place = Path("/proc/cpuinfo")
    text = place.read_text(encoding="utf-8") if place.exists() else ""
    return {flag for line in re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE) for flag in line.split()}


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_memory_bytes() -> int:
    """Memory that can be had without swapping, as the kernel estimates it; the limit of the control group if lower."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.exists() and (most := limit.read_text(encoding="utf-8").strip()) != "max":
        # What the group's files take in the page cache is given back when it is asked for
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        free = min(free, int(most) - int(stat["anon"]))
    return free


def _measured_precision(root: Path, device: str) -> str:
    """bf16 where its matrix products are clearly faster here, else fp32."""
    import json

    place = root / environment.STATE / "measured" / "precision.json"
    known: dict[str, str] = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
    key = f"{device}: {processor()}"
    if key not in known:
        known[key] = _faster(device)
        artifacts.write_json(place, known)
    return known[key]


def _faster(device: str) -> str:
    import torch

    from pipelines.core import cpu

    if device == "cpu" and not cpu.multiplies(torch.bfloat16):  # known without timing its slow products
        return "fp32"
    rates = {precision: matmul_rate(device, precision, size=1024) for precision in ("fp32", "bf16")}
    return "bf16" if rates["bf16"] > FASTER * rates["fp32"] else "fp32"
