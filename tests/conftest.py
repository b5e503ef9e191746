"""What several test files share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

# As `lmm-qa` does. On a busy machine, idle threads of torch that spin make small trainings several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from clips import write_all
from hypothesis import settings
from paths import SHARED

# How long one example takes says nothing on a machine that does other work as well.
settings.register_profile("lmm_qa", deadline=None)
settings.load_profile("lmm_qa")


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # In the background of a script Ctrl-C is ignored, and what tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def clips_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small clip of each kind (see clips.py), written once per test run."""
    return write_all(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real clips, backbones and labels that is not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED}: set LMM_QA_SHARED to the folder of shared data")
    return SHARED


@pytest.fixture(scope="session")
def family_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the directory of a small model of a family (see backbones.py), once per test run."""
    from backbones import builder

    return builder(tmp_path_factory.mktemp("backbones"))
