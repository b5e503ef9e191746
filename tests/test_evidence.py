"""python -m pytest tests/test_evidence.py"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import lmm_qa
from lmm_qa.config import Sampling, View
from lmm_qa.defects import DEFECTS
from lmm_qa.evidence import FILE, SUREST, Forests, weigh
from lmm_qa.video import read_frames

SAMPLES = Path(lmm_qa.__file__).parent / "samples"
sys.path.append(str(Path(__file__).parent.parent / "scripts"))


def test_trees_vote_as_scikit_learn_has_them_vote(tmp_path: Path) -> None:
    from embedded_evidence import as_arrays
    from sklearn.ensemble import ExtraTreesClassifier

    lot = np.random.default_rng(0)
    signs = lot.normal(size=(300, 6)).astype(np.float32)
    wanted = {"blur": signs[:, 0] * signs[:, 1] > 0, "noise": signs[:, 2] + signs[:, 3] > 1}
    kept = [
        (name, ExtraTreesClassifier(20, max_leaf_nodes=12, class_weight="balanced", random_state=1).fit(signs, there))
        for name, there in wanted.items()
    ]
    names = [f"sign {number}" for number in range(6)]
    as_arrays(kept, names).save(tmp_path / "trees.safetensors", "a test")
    forests = Forests.read(tmp_path / "trees.safetensors")
    for row in signs[:50]:
        odds = forests.weigh(dict(zip(names, map(float, row), strict=True)) | {"another": 1.0})
        for name, forest in kept:
            share = np.clip(forest.predict_proba(row[None])[0, 1], SUREST, 1 - SUREST)
            assert odds[name] == pytest.approx(np.log(share / (1 - share)), abs=1e-4)


def test_the_trees_of_the_package_know_the_defects_that_are_made() -> None:
    forests = Forests.read(FILE)
    assert forests.defects == tuple(defect.name for defect in DEFECTS if defect.causes)
    with pytest.raises(KeyError):
        weigh({})


@pytest.mark.parametrize(
    ("clip", "defect"),
    [
        ("blur_strong", "blur"),
        ("compression_strong", "compression"),
        ("freeze_strong", "stall"),
        ("noise_strong", "noise"),
    ],
)
def test_what_is_measured_tells_damaged_samples_from_the_clean_one(clip: str, defect: str) -> None:
    def odds(name: str) -> float:
        signs = read_frames(SAMPLES / f"astronaut_{name}.mp4", Sampling(), [View()], 28, measured=True).signs
        assert signs is not None
        return weigh(signs)[defect]

    assert odds(clip) > odds("clean") + 1
