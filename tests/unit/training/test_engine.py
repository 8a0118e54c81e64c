"""What the engine keeps DeepSpeed from doing."""

import pytest

from sat_train.distributed.processes import start_single_process
from sat_train.engine.build import keep_deepspeed_from_nvml
from tests.forks import start_python


@pytest.mark.parametrize(
    ("visible_devices", "asked"),
    [
        ("", True),
        ("0", True),
        ("3, 1", True),
        ("GPU-8f3c2b1a-0000-0000-0000-000000000000", False),
        ("MIG-c7384736-a75d-5afc-978f-d2f1294409fd,1", False),
    ],
)
def test_deepspeed_asks_nvml_only_where_gpus_are_numbered(visible_devices, asked, monkeypatch):
    start_single_process()
    from deepspeed.accelerator import cuda_accelerator

    monkeypatch.setattr(cuda_accelerator, "pynvml", object())
    keep_deepspeed_from_nvml(visible_devices)
    assert (cuda_accelerator.pynvml is not None) is asked
    if asked and visible_devices:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible_devices)
        assert cuda_accelerator.CUDA_Accelerator._get_nvml_gpu_id(None, 0) == int(visible_devices[0])


def test_what_deepspeed_imports_at_its_start_brings_no_compiler(tmp_path):
    code = (
        "import sys\n"
        "from sat_train.engine.build import import_deepspeed\n"
        "import_deepspeed()\n"
        "from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam\n"
        "sys.exit('torch._inductor.lowering' in sys.modules)\n"
    )
    process = start_python(["-c", code], log=tmp_path / "log.txt")
    assert process.wait(60) == 0, (tmp_path / "log.txt").read_text()
