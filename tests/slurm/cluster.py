"""A real Slurm cluster of several nodes on this machine, made for a test and thrown away after it.

Debian's Slurm is built for several slurmd on one host. Each node has a host name and an /etc/hosts of its own (a
UTS and a mount namespace), so that names resolve inside jobs as on a real cluster; with `network=True` it also
has a network of its own, whose link a test can cut. Everything lies under one folder: munge's key and socket, the
configuration, states, logs. Needs root, and Debian's munge, slurmctld, slurmd and slurm-client.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "unshare")
CALL_TIMEOUT_S = 20
SUBNET = "10.77.0"
SMALL_DISK_MB = 64

CONFIG = """
ClusterName=triptych
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its credential has expired: 120 s by default, and where this says less than 5 s.
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
# 2 would take a node back that an administrator set down.
ReturnToService=1
KillWait=2
MinJobAge=600
SlurmctldTimeout=10
SlurmdTimeout=8
InactiveLimit=0
MaxArraySize=1001
SlurmdParameters=config_overrides
GresTypes=gpu
PropagateResourceLimits=NONE
{nodes} CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=64000 {gres}
PartitionName=DEFAULT Nodes={names} MaxTime=INFINITE State=UP
PartitionName=train Default=YES DefaultTime=60 PriorityTier=10 PreemptMode=REQUEUE
PartitionName=high PriorityTier=100 PreemptMode=OFF
PartitionName=grace PriorityTier=5 PreemptMode=REQUEUE GraceTime=20
"""


def missing_programs() -> list[str]:
    """What must be installed before a cluster can start; also root, which the namespaces need."""
    paths = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    found = [program for program in PROGRAMS if shutil.which(program, path=paths) is None]
    return found if os.geteuid() == 0 else [*found, "root"]


@dataclass
class Cluster:
    """folder: short, because sockets lie in it. nodes: how many. gpus: fake devices, which Slurm only counts."""

    folder: Path
    nodes: int = 4
    cpus: int = 8
    gpus: int = 4
    network: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.nodes + 1)]

    @property
    def small_disk(self) -> Path:
        """A file system of SMALL_DISK_MB that all nodes share, for drills that fill it."""
        return self.folder / "small"

    # ---------------------------------------------------------------------------------------- start and stop

    def start(self) -> None:
        """Bring all daemons up and wait until every node is idle."""
        for name in ("state", "log", "run", "spool", "munge", "devices", "small"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        # Before the nodes: each has a mount namespace of its own, and sees what was mounted when it began.
        self._check(
            "mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_MB}m", "triptych-small", str(self.small_disk)
        )
        for name, mode in ((".", 0o711), ("munge", 0o711), ("run", 0o755)):
            (self.folder / name).chmod(mode)
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
        }
        self._start_munge()
        if self.network:
            self._link_nodes()
        self._write_configuration()
        self.start_controller()
        for name in self.names:
            self.start_node(name)
        self.wait_idle()

    def stop(self) -> None:
        """End the jobs, then only the daemons that `start` and `start_node` began."""
        self.start_controller()
        with contextlib.suppress(subprocess.SubprocessError):
            self.call("scancel", "--me")
        until(lambda: not self.call("squeue", "-h", "-t", "R,CG"), 15)
        self._end("slurmctld", *(f"slurmd.{node}" for node in self.names))
        self._end_left_steps()
        self._end("munged")
        _run("umount", "-l", str(self.small_disk))
        if self.network:
            for name in self.names:
                _run("ip", "netns", "del", self._namespace(name))
            _run("ip", "link", "del", "triptych0")

    def start_controller(self) -> None:
        if not self._alive("slurmctld"):
            self._check("slurmctld", "-f", self.environment["SLURM_CONF"])

    def stop_controller(self) -> None:
        self._end("slurmctld")

    def start_node(self, name: str) -> None:
        """Start a node's daemon, also again after `kill_node`."""
        if self._alive(f"slurmd.{name}"):
            return
        (self.folder / "spool" / name).mkdir(exist_ok=True)
        inside = 'hostname "$2" && mount --bind "$0" /etc/hosts && exec slurmd -f "$1" -N "$2"'
        enter = ["nsenter", f"--net=/run/netns/{self._namespace(name)}"] if self.network else []
        arguments = [str(self.folder / "hosts"), self.environment["SLURM_CONF"], name]
        self._check(*enter, "unshare", "--uts", "--mount", "bash", "-c", inside, *arguments)

    def kill_node(self, name: str) -> None:
        """kill -9 of the node's daemon and of everything it runs, as when a machine loses power."""
        os.kill(self._pid(f"slurmd.{name}"), signal.SIGKILL)
        for process in processes():
            if process.environment.get("SLURMD_NODENAME") == name and self._ours(process):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    def mount_empty(self, name: str, folder: Path) -> None:
        """Let a node see an empty folder where the others see a shared one."""
        inside = ["nsenter", f"--target={self._pid(f'slurmd.{name}')}", "--mount"]
        self._check(*inside, "mount", "-t", "tmpfs", "triptych-empty", str(folder))

    def unmount(self, name: str, folder: Path) -> None:
        self._check(
            "nsenter", f"--target={self._pid(f'slurmd.{name}')}", "--mount", "umount", "-l", str(folder)
        )

    def cut_link(self, name: str) -> None:
        self._check("ip", "link", "set", f"tri{name}", "down")

    def mend_link(self, name: str) -> None:
        self._check("ip", "link", "set", f"tri{name}", "up")

    # ---------------------------------------------------------------------------------------------- questions

    def call(self, *command: str, timeout_s: float = CALL_TIMEOUT_S) -> str:
        """A Slurm client's output. Bounded: clients wait minutes for a controller that is gone."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED ..."""
        return self.call("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")

    def wait_state(self, job: str, *wanted: str, timeout_s: float = 60) -> str:
        if not until(lambda: self.state(job) in wanted, timeout_s):
            raise TimeoutError(
                f"job {job} is {self.state(job)}, not {' or '.join(wanted)}, after {timeout_s} s"
            )
        return self.state(job)

    def wait_idle(self, timeout_s: float = 20) -> None:
        def idle() -> bool:
            return self.call("sinfo", "-h", "-p", "train", "-o", "%T %D") == f"idle {self.nodes}"

        if not until(idle, timeout_s):
            raise TimeoutError(f"the nodes are not idle after {timeout_s} s:\n{self.call('sinfo')}")

    # ------------------------------------------------------------------------------------------------ insides

    def _start_munge(self) -> None:
        key = self.folder / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        files = {
            "--key-file": key,
            "--socket": self.folder / "run" / "munge.sock",
            "--pid-file": self.folder / "run" / "munged.pid",
            "--log-file": self.folder / "munge" / "munged.log",
            "--seed-file": self.folder / "munge" / "seed",
        }
        self._check("munged", *(str(part) for pair in files.items() for part in pair), "--num-threads", "2")

    def _write_configuration(self) -> None:
        host, names = socket.gethostname().split(".")[0], f"node[1-{self.nodes}]"
        port = free_ports(self.nodes + 1)
        hosts = Path("/etc/hosts").read_text(encoding="utf-8")
        if self.network:
            kept = [line for line in hosts.splitlines() if line.split()[1:2] != [host]]
            hosts = "\n".join([*kept, f"{SUBNET}.1 {host}"])
            nodes = f"NodeName={names} NodeAddr={SUBNET}.[11-{10 + self.nodes}] Port={port + 1}"
        else:
            nodes = f"NodeName={names} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{port + 1}-{port + self.nodes}]"
        address = {
            name: f"{SUBNET}.{11 + i}" if self.network else "127.0.0.1" for i, name in enumerate(self.names)
        }
        lines = [hosts, *(f"{address[name]} {name}" for name in self.names)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n", encoding="utf-8")
        text = CONFIG.format(
            host=host,
            address=f"{SUBNET}.1" if self.network else "127.0.0.1",
            port=port,
            folder=self.folder,
            nodes=nodes,
            names=names,
            cpus=self.cpus,
            gres=f"Gres=gpu:{self.gpus} State=UNKNOWN" if self.gpus else "State=UNKNOWN",
        )
        (self.folder / "slurm.conf").write_text(text, encoding="utf-8")
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n", encoding="utf-8")
        self._fake_devices(names)

    def _fake_devices(self, names: str) -> None:
        """Slurm asks only that a GPU's file is a device."""
        devices = self.folder / "devices"
        for number in range(self.gpus):
            os.mknod(devices / f"gpu{number}", 0o600 | stat.S_IFCHR, os.makedev(195, number))
        line = f"NodeName={names} Name=gpu File={devices}/gpu[0-{self.gpus - 1}]\n"
        (self.folder / "gres.conf").write_text(line if self.gpus else "", encoding="utf-8")

    def _link_nodes(self) -> None:
        self._check("ip", "link", "add", "triptych0", "type", "bridge")
        self._check("ip", "addr", "add", f"{SUBNET}.1/24", "dev", "triptych0")
        self._check("ip", "link", "set", "triptych0", "up")
        for number, name in enumerate(self.names):
            space = self._namespace(name)
            self._check("ip", "netns", "add", space)
            peer = ("type", "veth", "peer", "name", "eth0", "netns", space)
            self._check("ip", "link", "add", f"tri{name}", *peer)
            self._check("ip", "link", "set", f"tri{name}", "master", "triptych0", "up")
            self._check("ip", "-n", space, "link", "set", "lo", "up")
            self._check("ip", "-n", space, "addr", "add", f"{SUBNET}.{11 + number}/24", "dev", "eth0")
            self._check("ip", "-n", space, "link", "set", "eth0", "up")

    def _namespace(self, name: str) -> str:
        return f"triptych-{name}"

    def _check(self, *command: str) -> None:
        done = subprocess.run(
            command,
            env=self.environment or None,
            capture_output=True,
            text=True,
            timeout=CALL_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")

    def _pid(self, daemon: str) -> int:
        return int((self.folder / "run" / f"{daemon}.pid").read_text())

    def _alive(self, daemon: str) -> bool:
        try:
            os.kill(self._pid(daemon), 0)
        except (OSError, ValueError):
            return False
        return True

    def _end(self, *daemons: str) -> None:
        """SIGTERM, and SIGKILL after three seconds, to the daemons whose process numbers the folder holds."""
        ending: set[int] = set()
        for daemon in daemons:
            with contextlib.suppress(OSError, ValueError):
                pid = self._pid(daemon)
                os.kill(pid, signal.SIGTERM)
                ending.add(pid)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ending), 3)
        for pid in ending:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for daemon in daemons:
            (self.folder / "run" / f"{daemon}.pid").unlink(missing_ok=True)

    def _end_left_steps(self) -> None:
        for process in processes():
            if self._ours(process) and process.name == "slurmstepd":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    def _ours(self, process: Process) -> bool:
        return process.environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]


@dataclass(frozen=True)
class Process:
    pid: int
    name: str
    environment: dict[str, str]


def processes() -> list[Process]:
    """Every process whose environment can be read."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                pairs = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
                found.append(Process(int(folder.name), (folder / "comm").read_text().strip(), environment))
    return found


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody listens on, below those where the ranks of jobs meet."""
    for first in range(10000 + os.getpid() % 900 * 10, 20000 - count, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise RuntimeError("no free ports between 10000 and 20000")


def until(condition: Callable[[], object], timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, timeout=CALL_TIMEOUT_S, check=False)
