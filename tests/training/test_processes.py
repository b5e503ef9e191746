"""python -m pytest tests/training/test_processes.py"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import PartialState

from lmm_qa.training.processes import gather_prepared

TWO_PROCESSES = """
import time
from datetime import timedelta
from lmm_qa.training import processes

processes.STEP_TIMEOUT = timedelta(seconds=3)
state = processes.start_processes()
late = state.process_index == 1
time.sleep(5 * late)
if processes.gather_prepared([state.process_index] * (1 + late), state) == [0, 1, 1]:
    print("prepared", flush=True)
time.sleep(5 * late)
try:
    state.wait_for_everyone()
except RuntimeError:
    print("noticed", flush=True)
"""


def test_a_single_process_waits_for_nobody() -> None:
    assert gather_prepared(["a"], PartialState(cpu=True)) == ["a"]


@pytest.mark.slow
def test_a_process_that_hangs_is_noticed_but_one_that_is_late_before_training_is_awaited(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*launch, str(tmp_path / "two.py")]
    done = subprocess.run(command, text=True, capture_output=True, env=environment, timeout=120)
    assert done.stdout.count("prepared") == 2, done.stderr
    assert done.stdout.count("noticed") >= 1
