"""Every launcher's variables give one place, and half of them give an error that names what is missing."""

import pytest

from sat_train.distributed.environment import RankEnv
from sat_train.errors import LaunchError

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "gpu03",
    "MASTER_PORT": "29501",
}
SLURM = {
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_NUM_TASKS": "18",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),2",
    "SLURM_STEP_NODELIST": "gpu[03-04,9]",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def test_without_a_launcher_the_process_is_alone():
    env = RankEnv.read({"PATH": "/bin", "LOCAL_RANK": "0"})
    assert (env.rank, env.world_size, env.launcher) == (0, 1, "single")


def test_torchrun_variables_are_read():
    assert RankEnv.read(TORCHRUN) == RankEnv(5, 1, 8, 4, "gpu03", 29501, "torchrun")


def test_the_deepspeed_launcher_says_local_size():
    variables = {**TORCHRUN, "LOCAL_SIZE": "4"}
    del variables["LOCAL_WORLD_SIZE"]
    assert RankEnv.read(variables).local_world_size == 4


def test_slurm_step():
    assert RankEnv.read(SLURM) == RankEnv(9, 1, 18, 8, "gpu03", 20000 + 2345, "slurm")


def test_a_slurm_batch_script_without_srun_is_a_single_process():
    variables = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    assert RankEnv.read(variables).launcher == "single"


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("gpu03", "gpu03"), ("a1,b2", "a1"), ("n[1,5-7]-ib,x", "n1-ib"), ("r1c[001-010]", "r1c001")],
)
def test_rank_0_of_slurm_is_on_the_first_machine(nodelist, host):
    assert RankEnv.read({**SLURM, "SLURM_STEP_NODELIST": nodelist}).master_addr == host


def test_openmpi_on_one_machine_needs_no_address():
    assert RankEnv.read(OPENMPI) == RankEnv(1, 1, 2, 2, "127.0.0.1", 29500, "openmpi")


def test_openmpi_on_several_machines_needs_one():
    with pytest.raises(LaunchError, match="MASTER_ADDR is not set"):
        RankEnv.read({**OPENMPI, "OMPI_COMM_WORLD_SIZE": "4"})


def test_torchrun_inside_srun_counts():
    assert RankEnv.read({**SLURM, **TORCHRUN, "TORCHELASTIC_RUN_ID": "1"}).launcher == "torchrun"


def test_no_two_jobs_or_steps_of_a_machine_share_a_port_nor_take_one_that_the_system_hands_out():
    variables = [
        {**SLURM, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
        for job in range(12000, 12040)
        for step in (0, 1, 2)
    ]
    ports = [RankEnv.read(each).master_port for each in variables]
    assert len(set(ports)) == len(ports)
    assert all(20000 <= port < 30000 for port in ports)


GARBAGE = ["", " ", "first", "-1", "1.0", "0x1", "1_0", "\u0661", "9" * 5000, "1\n2", "nan"]


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        (variables, name)
        for variables in (TORCHRUN, SLURM, OPENMPI)
        for name in variables
        if name not in ("MASTER_ADDR", "SLURM_STEP_NODELIST")
    ],
)
def test_no_number_of_a_launcher_is_guessed(variables, name):
    for value in GARBAGE:
        with pytest.raises(LaunchError, match=name) as caught:
            RankEnv.read({**variables, name: value})
        assert caught.value.exit_code == 2
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", ["0", "65536", "99999", "-1", "http", "29500 ,"])
@pytest.mark.parametrize("launcher", [TORCHRUN, {**SLURM}, {**OPENMPI}])
def test_a_port_is_a_port(launcher, value):
    with pytest.raises(LaunchError, match="MASTER_PORT"):
        RankEnv.read({**launcher, "MASTER_PORT": value})


@pytest.mark.parametrize("value", ["a b", "tcp://gpu03", "gpu03\x1b[2J", "x" * 5000, "gpu03/1"])
def test_an_address_is_a_host(value):
    with pytest.raises(LaunchError, match="MASTER_ADDR"):
        RankEnv.read({**TORCHRUN, "MASTER_ADDR": value})


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"),
        ({**TORCHRUN, "RANK": "first"}, "RANK='first'"),
        ({**TORCHRUN, "RANK": "8"}, "rank 8 of 8 processes"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "local rank 4 of 4 processes"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "16"}, "16 processes on this machine, but 8 in all"),
        ({**SLURM, **TORCHRUN}, "RANK=5 WORLD_SIZE=8, but srun says rank 9 of 18"),
        ({**OPENMPI, **TORCHRUN}, "mpirun says rank 1 of 2"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "many"}, "SLURM_STEP_TASKS_PER_NODE='many'"),
        ({**SLURM, "SLURM_NODEID": "3"}, "SLURM_NODEID 3 of 3"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}, "SLURM variables are incomplete"),
    ],
)
def test_missing_or_contradictory_variables_are_named(variables, message):
    with pytest.raises(LaunchError, match=message):
        RankEnv.read(variables)
