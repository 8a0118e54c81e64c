"""A SLURM cluster of one machine: controller and node on 127.0.0.1, with everything it writes in one folder.

Debian's packages `slurm-wlm` and `munge` are all it needs; no cgroups, no data base, no service.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sat_train.testing.ports import HeldPort
from tests.runs.launching import environment, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")

# One real core serves several jobs: these tests ask for order, not for speed. Credentials that end soon let a
# requeued job start within seconds instead of two minutes.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
BatchStartTimeout=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
GresTypes=gpu
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=16 Gres=gpu:16 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def missing() -> str:
    """Says what keeps this machine from being a cluster; empty when nothing does."""
    if os.geteuid() != 0:
        return "not root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"no {', '.join(absent)}: apt-get install slurm-wlm munge" if absent else ""


class Cluster:
    """Three daemons, once `start` has been called.

    Args:
        folder: Empty, with a path that every user may walk.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in ("munge", "state", "spool"):
            (folder / name).mkdir(mode=0o755)
        conf = folder / "slurm.conf"
        self._controller_port, self._node_port = HeldPort(), HeldPort()
        ports = {"controller_port": self._controller_port.number, "node_port": self._node_port.number}
        conf.write_text(CONF.format(folder=folder, host=socket.gethostname().split(".")[0], **ports))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-15]\n")
        for number in range(16):
            (folder / f"gpu{number}").touch()  # SLURM counts files; nothing opens them
        self._environment = {**environment(), "SLURM_CONF": str(conf)}

    def start(self) -> None:
        """Starts the daemons and waits until the node takes jobs."""
        self._start_munge()
        self._run("slurmctld", "-c")
        self._run("slurmd", "-N", "localhost")
        wait_until(lambda: "idle" in self._run("sinfo", "--noheader", check=False), timeout_s=240, poll_s=0.2)

    def submit(self, script: Path, options: Sequence[str], words: Sequence[str], *, cwd: Path) -> str:
        """Returns the number of the new job."""
        line = ["sbatch", "--parsable", *options, str(script), *words]
        return self._run(*line, cwd=cwd).strip()

    def state(self, job: str) -> str:
        """Returns the state of a job, e.g. RUNNING or COMPLETED."""
        return self._field(job, "JobState")

    def starts(self, job: str) -> int:
        """Returns how often a job has been started again."""
        return int(self._field(job, "Restarts"))

    def exit_code(self, job: str) -> int:
        """Returns the exit code of a job that has ended."""
        return int(self._field(job, "ExitCode").partition(":")[0])

    def send(self, *line: str) -> None:
        """Runs `scontrol` or `scancel`."""
        self._run(*line)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Waits for something that jobs do."""
        wait_until(condition, timeout_s=240, poll_s=0.1)

    def close(self) -> None:
        """Ends all jobs and the daemons."""
        self._run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
        self._run("scancel", "--user=root", check=False)
        for _ in range(150):  # a job that outlives its node's daemon would outlive the tests
            if not self._run("squeue", "--noheader", check=False).strip():
                break
            time.sleep(0.2)
        for name in ("slurmd.pid", "slurmctld.pid", "munge/pid"):
            path = self._folder / name
            if path.exists():
                _end(int(path.read_text()))
        self._controller_port.close()
        self._node_port.close()

    def _start_munge(self) -> None:
        folder = self._folder / "munge"
        key = folder / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = {"socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        self._run("munged", f"--key-file={key}", *options, "--force")

    def _field(self, job: str, name: str) -> str:
        output = self._run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.partition("=")[::2] for word in output.split())[name]

    def _run(self, *line: str, cwd: Path | None = None, check: bool = True) -> str:
        done = subprocess.run(
            line,
            cwd=cwd or self._folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{line}: {done.stdout}"
        return done.stdout


def _end(pid: int) -> None:
    """Ends a daemon and waits until it has gone."""
    try:
        os.kill(pid, signal.SIGTERM)
        for _ in range(100):
            os.kill(pid, 0)
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
