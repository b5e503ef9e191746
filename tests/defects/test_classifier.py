"""python -m pytest tests/defects/test_classifier.py"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from paths import SAMPLES, SCRIPTS

from lmm_qa.config import Sampling, View
from lmm_qa.defects.classifier import FILE, MIN_PROBABILITY, Forests, defect_log_odds
from lmm_qa.defects.features import FeatureExtractor
from lmm_qa.defects.vocabulary import DEFECTS
from lmm_qa.video.decode import read_frames

sys.path.append(str(SCRIPTS))


def test_trees_vote_as_scikit_learn_has_them_vote(tmp_path: Path) -> None:
    from embedded.classifier import export_forests, forest

    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 6)).astype(np.float32)
    wanted = {"blur": features[:, 0] * features[:, 1] > 0, "noise": features[:, 2] + features[:, 3] > 1}
    settings = {"n_estimators": 20, "max_leaf_nodes": 12, "features": 5}
    models = {name: forest(settings).fit(features, present) for name, present in wanted.items()}
    names = [f"feature {number}" for number in range(6)]
    export_forests(models, names).save(tmp_path / "trees.safetensors", "a test")
    forests = Forests.read(tmp_path / "trees.safetensors")
    for row in features[:50]:
        odds = forests.defect_log_odds(dict(zip(names, map(float, row), strict=True)) | {"another": 1.0})
        for name, model in models.items():
            share = np.clip(model.predict_proba(row[None])[0, 1], MIN_PROBABILITY, 1 - MIN_PROBABILITY)
            assert odds[name] == pytest.approx(np.log(share / (1 - share)), abs=1e-4)


def test_the_trees_of_the_package_know_the_defects_that_are_made() -> None:
    forests = Forests.read(FILE)
    assert forests.defects == tuple(defect.name for defect in DEFECTS if defect.causes)
    with pytest.raises(KeyError):
        defect_log_odds({})


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
        features = read_frames(
            SAMPLES / f"astronaut_{name}.mp4", Sampling(), [View()], 28, measure=FeatureExtractor
        ).features
        assert features is not None
        return defect_log_odds(features)[defect]

    assert odds(clip) > odds("clean") + 1
