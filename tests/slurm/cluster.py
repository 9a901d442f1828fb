"""A real SLURM of this machine alone: in, a folder; out, a controller and three nodes on loopback.

Needs Debian's slurmctld, slurmd, slurm-client and munge, and root, which starts the nodes. Each
node has a host name of its own, in namespaces of its own, so that jobs take each other for
processes of other machines. Nothing outside the folder is written; every process is ended by pid.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "setpriv")
ACCOUNTING_PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb")
CLIENTS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo", "sacct", "sacctmgr")
# Debian puts daemons where only root's PATH leads.
DAEMON_PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
NODES = {"cpu1": 0, "gpu1": 2, "gpu2": 2}
"""Name → GPUs of each node."""
# MinJobAge: as on most clusters. cred_expire: a requeued job starts after as many seconds.
# OverMemoryKill: without cgroups the node's own accounting kills what takes too much memory.
SLURM_CONF = """\
ClusterName=cotrain
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=10
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType={accounting}
MinJobAge=300
KillWait=5
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=2
GresTypes=gpu
{nodes}
PartitionName=cpu Nodes=cpu1 Default=YES MaxTime=INFINITE PriorityTier=1
PartitionName=gpu Nodes=gpu1,gpu2 MaxTime=INFINITE PriorityTier=1
PartitionName=urgent Nodes=cpu1 MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={accounting_port}
SlurmUser=root
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
"""


def missing_programs(*, accounting: bool = False) -> list[str]:
    """Return the programs that a cluster needs and that are not installed."""
    needed = PROGRAMS + (ACCOUNTING_PROGRAMS if accounting else ())
    return [name for name in needed if shutil.which(name, path=DAEMON_PATH) is None]


def wait_until(true: Callable[[], object], *, seconds: float, what: str) -> None:
    """Wait until `true()` holds; TimeoutError with `what` after so many seconds."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


class Cluster:
    """A running cluster; use it as a context manager.

    environment: for processes that talk to it: their PATH begins with `bin`, whose wrappers tell
    each client where this cluster is, because a job step loses SLURM_CONF on its way. There is also
    the `cotrain` whose epochs and cases last (slow_cotrain.py).
    """

    def __init__(self, folder: Path, *, accounting: bool = False) -> None:
        self.folder = folder
        self._processes: list[subprocess.Popen] = []
        self._accounting = accounting
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
            "SLURM_CONF": str(folder / "slurm.conf"),
            # The commands of this Python's environment, and before them the clients.
            "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def __enter__(self) -> "Cluster":
        self._write_files()
        try:
            self._start("munged", "--foreground", "--force", *self._munge_options())
            wait_until((self.folder / "munge.sock").exists, seconds=20, what="munged")
            if self._accounting:
                self._start_accounting()
            self._start_controller()
            for node in NODES:
                self._start(
                    *("slurmd", "-D", "-N", node, "-f", self.folder / "slurm.conf"), host=node
                )
            wait_until(self._all_idle, seconds=40, what=f"idle nodes, see {self.folder}/*.log")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind, error, trace) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.run("scancel", "--user", "root")
            wait_until(lambda: not self.run("squeue", "-h"), seconds=30, what="cancelled jobs")
        self._stop()

    def run(self, *words: object) -> str:
        """Run a client of this cluster and return what it prints."""
        done = subprocess.run(
            [str(word) for word in words],
            env=self.environment,
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    def jobs(self) -> list[dict[str, str]]:
        """Return the jobs that are not over: id, state, node, comment (their rule), folder."""
        fields = {"id": "%i", "state": "%T", "node": "%N", "comment": "%k", "folder": "%Z"}
        text = self.run("squeue", "--noheader", "--format", "|".join(fields.values()))
        return [
            dict(zip(fields, line.split("|"), strict=True)) for line in text.splitlines() if line
        ]

    def history(self) -> list[dict[str, str]]:
        """Return all jobs of this cluster as `scontrol show job` has them, oldest first."""
        text = self.run("scontrol", "show", "job", "--oneliner")
        return [
            dict(word.split("=", 1) for word in line.split() if "=" in word)
            for line in text.splitlines()
            if line.startswith("JobId=")
        ]

    def job(self, number: str) -> dict[str, str]:
        """Return one job as `scontrol show job` has it."""
        return next(job for job in self.history() if job["JobId"] == number)

    @contextlib.contextmanager
    def without_controller(self) -> Iterator[None]:
        """Stop the controller, as an administrator does, and start it anew in the end."""
        self._controller.terminate()
        self._controller.wait(60)
        place = self._processes.index(self._controller)
        try:
            yield
        finally:
            self._start_controller()
            # It is to be stopped in its turn.
            self._processes[place] = self._processes.pop()
            wait_until(self._answers, seconds=60, what="the controller")

    def _start_controller(self) -> None:
        self._start("slurmctld", "-D", "-f", self.folder / "slurm.conf")
        self._controller = self._processes[-1]

    def _answers(self) -> bool:
        try:
            self.run("squeue")
        except subprocess.CalledProcessError:
            return False
        return True

    def _all_idle(self) -> bool:
        try:
            states = self.run("sinfo", "--noheader", "--Node", "--format", "%T").split()
        except subprocess.CalledProcessError:
            return False
        return bool(states) and set(states) == {"idle"}

    def _start(self, *words: object, host: str = "") -> None:
        """Start a daemon; its processes and their jobs call this machine by the name `host`."""
        program = shutil.which(str(words[0]), path=DAEMON_PATH)
        rename = f'hostname {host} && mount --bind {self.folder}/hosts /etc/hosts && exec "$@"'
        renamed = ["unshare", "--uts", "--mount", "sh", "-c", rename, "sh"]
        arguments = list(map(str, words[1:]))
        log = open(self.folder / "daemons.log", "ab")  # noqa: SIM115
        self._processes.append(
            subprocess.Popen(
                # Ends with this process, whatever ends that.
                ["setpriv", "--pdeathsig", "TERM", *(renamed if host else []), program, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        )

    def _start_accounting(self) -> None:
        accounting_port, database_port = self._ports
        data = self.folder / "database"
        subprocess.run(
            ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}"],
            check=True,
            capture_output=True,
        )
        self._start(
            *("mariadbd", "--no-defaults", "--user=root", f"--datadir={data}"),
            *(f"--socket={self.folder}/database.sock", "--bind-address=127.0.0.1"),
            *(f"--port={database_port}", f"--pid-file={self.folder}/database.pid"),
        )
        wait_until((self.folder / "database.sock").exists, seconds=60, what="the database")
        subprocess.run(
            ["mariadb", "--no-defaults", f"--socket={self.folder}/database.sock"],
            input="CREATE DATABASE slurm; CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';"
            "GRANT ALL ON slurm.* TO 'slurm'@'127.0.0.1';",
            text=True,
            check=True,
        )
        self._start("slurmdbd", "-D")
        wait_until(lambda: _listens(accounting_port), seconds=60, what="slurmdbd")

    def _stop(self) -> None:
        # Without cgroups a node does not find the processes of a job whose parents have gone.
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"SLURM_CONF={self.folder}/".encode() in environment.read_bytes():
                    process = int(environment.parent.name)
                    if process not in {os.getpid(), *(each.pid for each in self._processes)}:
                        os.kill(process, signal.SIGKILL)
        # Nodes before the controller before munged, each by its pid.
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _munge_options(self) -> list[str]:
        return [
            f"--socket={self.folder}/munge.sock",
            f"--key-file={self.folder}/munge.key",
            f"--pid-file={self.folder}/munged.pid",
            f"--log-file={self.folder}/munged.log",
            f"--seed-file={self.folder}/munged.seed",
        ]

    def _write_files(self) -> None:
        for name in ("state", "bin", "dev", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(64))
        key.chmod(0o600)
        controller_port, accounting_port, database_port, *node_ports = free_ports(3 + len(NODES))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=8 "
            f"RealMemory=32000 State=UNKNOWN" + (f" Gres=gpu:fake:{gpus}" if gpus else "")
            for (node, gpus), port in zip(NODES.items(), node_ports, strict=True)
        )
        accounting = "accounting_storage/none"
        if self._accounting:
            accounting = (
                "accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\n"
                f"AccountingStoragePort={accounting_port}\n"
                # To the daemon of accounting, this is where munge is.
                f"AccountingStoragePass={self.folder}/munge.sock"
            )
            self._ports = accounting_port, database_port
            dbd = self.folder / "slurmdbd.conf"
            dbd.write_text(
                SLURMDBD_CONF.format(
                    folder=self.folder,
                    accounting_port=accounting_port,
                    database_port=database_port,
                )
            )
            dbd.chmod(0o600)
        (self.folder / "slurm.conf").write_text(
            SLURM_CONF.format(
                folder=self.folder,
                controller_port=controller_port,
                nodes=nodes,
                accounting=accounting,
            )
        )
        (self.folder / "hosts").write_text(
            "".join(f"127.0.0.1 {name}\n" for name in ("localhost", socket.gethostname(), *NODES))
        )
        # A regular file would leave CUDA_VISIBLE_DEVICES empty.
        for number in range(2):
            (self.folder / f"dev/nvidia{number}").symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text(
            "AutoDetect=off\n"
            + "".join(
                f"NodeName={node} Name=gpu Type=fake File={self.folder}/dev/nvidia[0-{gpus - 1}] "
                "Flags=nvidia_gpu_env\n"
                for node, gpus in NODES.items()
                if gpus
            )
        )
        for name in CLIENTS:
            program = shutil.which(name)
            if program is not None:
                self._write_program(
                    name, f'export SLURM_CONF={self.folder}/slurm.conf\nexec {program} "$@"'
                )
        slow_cotrain = Path(__file__).with_name("slow_cotrain.py")
        self._write_program("cotrain", f'exec {sys.executable} {slow_cotrain} "$@"')

    def _write_program(self, name: str, script: str) -> None:
        program = self.folder / "bin" / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
