"""Folders that tests read."""

from __future__ import annotations

import os
from pathlib import Path

import lmm_qa

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PACKAGE = Path(lmm_qa.__file__).parent
SAMPLES = PACKAGE / "samples"
EMBEDDED = PACKAGE / "model" / "embedded"
SCRIPTS = ROOT / "scripts"
SHARED = Path(os.environ.get("LMM_QA_SHARED") or ROOT.parent / "shared")
"""Real clips, labels and published tokenizers; not part of the repository, and tests run without them."""
