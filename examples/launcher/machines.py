"""Where a call runs: the first argument, ENV, and what the cluster says in environment variables, as machines and
processes.

dsw is one node with GPUs (without any, as many CPU processes as TP and PP take); dlc has a node for each copy of the
script and says which in WORLD_SIZE and RANK; slurm likewise, in SLURM_*; cpu is gloo on this machine. It does not know
what is run there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from toolkits.positional import is_number

PROCESSES = "NPROC_PER_NODE"
ONE_COPY = "one copy of the model"
SLURM_PORTS = 20_000
"""First of the 10,000 ports that jobs of Slurm take by their number, where MASTER_PORT is not set."""


@dataclass(frozen=True)
class Machines:
    """The processes of a run, as torchrun is told of them."""

    processes: int
    """On each node."""
    nodes: int = 1
    rank: int = 0
    """Of this node."""
    address: str = ""
    """Of node 0."""
    port: int = 0
    gpus: bool = True
    note: str = ""
    """Where the number of processes comes from."""
    warning: str = ""

    @property
    def world_size(self) -> int:
        """Processes on all nodes."""
        return self.nodes * self.processes

    @property
    def torchrun(self) -> tuple[str, ...]:
        """torchrun's arguments where there are several nodes."""
        return (
            *("--nnodes", str(self.nodes), "--node-rank", str(self.rank), "--nproc-per-node", str(self.processes)),
            *("--master-addr", self.address, "--master-port", str(self.port)),
        )

    def describe(self) -> str:
        """For a person."""
        unit = "process" if self.processes == 1 else "processes"
        here = f"{self.processes} {unit}{f' ({self.note})' if self.note else ''}"
        if self.nodes == 1:
            return f"one node, {here}"
        return f"{self.nodes} nodes of {here}, this is node {self.rank}; node 0 is {self.address}:{self.port}"


def machines(place: str, environment: Mapping[str, str], fewest: int) -> Machines:
    """The machines that a place stands for.

    Args:
        fewest: processes that hold one copy of the model.

    Raises:
        ValueError: an environment variable is missing or wrong; all of them are named.
    """
    return {"dsw": _dsw, "dlc": _dlc, "slurm": _slurm, "cpu": _cpu}[place](environment, fewest)


def _dsw(environment: Mapping[str, str], fewest: int) -> Machines:
    reader = _Reader(environment)
    wanted, found = reader.optional(PROCESSES), num_gpus(environment)
    reader.check()
    if not found:
        warning = "ENV=dsw, but there is no GPU here: it runs on the CPU, as with ENV=cpu"
        return Machines(wanted or fewest, gpus=False, note=PROCESSES if wanted else ONE_COPY, warning=warning)
    return Machines(wanted or found, note=PROCESSES if wanted else "GPUs here")


def _cpu(environment: Mapping[str, str], fewest: int) -> Machines:
    reader = _Reader(environment)
    wanted = reader.optional(PROCESSES)
    reader.check()
    return Machines(wanted or fewest, gpus=False, note=PROCESSES if wanted else ONE_COPY)


def _dlc(environment: Mapping[str, str], fewest: int) -> Machines:
    reader = _Reader(environment)
    nodes, rank = reader.number("WORLD_SIZE"), reader.number("RANK", least=0)
    name = PROCESSES if environment.get(PROCESSES) else "KUBERNETES_CONTAINER_RESOURCE_GPU"
    processes = reader.number(name)
    if nodes == 1 and not reader.problems:
        return Machines(processes, note=name)
    address, port = reader.text("MASTER_ADDR"), reader.number("MASTER_PORT")
    reader.require(rank < nodes, f"RANK={rank}: must be less than WORLD_SIZE={nodes}, the number of nodes")
    reader.check("with ENV=dlc the cluster says where it runs: WORLD_SIZE and RANK count nodes, not processes")
    return Machines(processes, nodes, rank, address, port, note=name)


def _slurm(environment: Mapping[str, str], fewest: int) -> Machines:
    reader = _Reader(environment)
    nodes = reader.number("SLURM_NNODES" if environment.get("SLURM_NNODES") else "SLURM_JOB_NUM_NODES")
    rank = reader.number("SLURM_NODEID", least=0)
    names = (PROCESSES, "SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE")
    name = next((name for name in names if environment.get(name)), names[1])
    processes = reader.number(name, pattern=r"(?:[\w.-]+:)?(\d+)")
    local = environment.get("SLURM_LOCALID", "0")
    reader.require(
        local == "0", f"SLURM_LOCALID={local}: start one task on each node (--ntasks-per-node=1); it starts the others"
    )
    if nodes == 1 and not reader.problems:
        return Machines(processes, note=name)
    address = environment.get("MASTER_ADDR") or first_host(reader.text("SLURM_JOB_NODELIST"))
    job = 0 if environment.get("MASTER_PORT") else reader.number("SLURM_JOB_ID")
    port = reader.number("MASTER_PORT") if environment.get("MASTER_PORT") else SLURM_PORTS + job % 10_000
    reader.check("with ENV=slurm the script is started by srun in a job, once on each node")
    return Machines(processes, nodes, rank, address, port, note=name)


# -------------------------------------------------------------------------------------------- environment variables


class _Reader:
    """Reads variables and gathers what is wrong with them."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.problems: list[str] = []

    def text(self, name: str) -> str:
        value = self.environment.get(name, "")
        self.require(bool(value), f"{name} is not set")
        return value

    def number(self, name: str, least: int = 1, pattern: str = r"(\d+)") -> int:
        """A whole number, or what the pattern's group holds of it; 0 where that is a problem."""
        text = self.text(name)
        match = re.fullmatch(pattern, text, re.ASCII)
        if match and int(match[1]) >= least:
            return int(match[1])
        self.require(not text, f"{name}={text!r}: must be a whole number of at least {least}")
        return 0

    def optional(self, name: str) -> int | None:
        return self.number(name) if self.environment.get(name) else None

    def require(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(f"environment variable {problem}")

    def check(self, explanation: str = "") -> None:
        if self.problems:
            raise ValueError("\n".join([*self.problems, *([explanation] if explanation else [])]))


def num_gpus(environment: Mapping[str, str]) -> int:
    """GPUs that processes started here would see, without asking torch."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    devices = [path for path in Path("/dev").glob("nvidia*") if is_number(path.name.removeprefix("nvidia"))]
    if visible is None or not devices:
        return len(devices)
    return len([word for word in visible.split(",") if word.strip() and word.strip() != "-1"])


def first_host(nodes: str) -> str:
    """The first name in Slurm's list of nodes: gpu[003-006,9],cpu1 begins with gpu003."""
    match = re.match(r"([^,\[]+)(?:\[([^,\]-]+)[^\]]*\])?([^,\[]*)", nodes)
    return f"{match[1]}{match[2] or ''}{match[3]}" if match else nodes
