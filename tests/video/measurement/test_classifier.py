"""python -m pytest tests/video/measurement/test_classifier.py"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from paths import SAMPLES, SCRIPTS

from lmm_qa.config import Sampling, View
from lmm_qa.defects.vocabulary import DEFECTS
from lmm_qa.video.decode import read_frames
from lmm_qa.video.measurement.classifier import FILE, MIN_PROBABILITY, QUALITY, Forests, predict
from lmm_qa.video.measurement.features import FeatureExtractor

sys.path.append(str(SCRIPTS))


def test_trees_vote_as_scikit_learn_has_them_vote(tmp_path: Path) -> None:
    from embedded.classifier import Forest, export_forests

    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 6)).astype(np.float32)
    strength = {"blur": np.clip(features[:, 0] * features[:, 1], 0, 1), "noise": np.clip(features[:, 2] - 1, 0, 1)}
    models = {name: Forest(20, 12, 5).fit(features, (each > 0) * 1.0, each) for name, each in strength.items()}
    models[QUALITY] = Forest(20, 12, 5).fit(features, np.clip(features[:, 4] / 4 + 0.5, 0, 1))
    names = [f"feature {number}" for number in range(6)]
    export_forests(models, names).save(tmp_path / "trees.safetensors", "a test")
    forests = Forests.read(tmp_path / "trees.safetensors")
    for row in features[:50]:
        found = forests.predict(dict(zip(names, map(float, row), strict=True)) | {"another": 1.0})
        assert found.log_odds.keys() == found.severity.keys() == strength.keys()
        for name in strength:
            value = models[name].model.predict(row[None, models[name].selected])[0]
            share = np.clip(value[0], MIN_PROBABILITY, 1 - MIN_PROBABILITY)
            assert found.log_odds[name] == pytest.approx(np.log(share / (1 - share)), abs=1e-4)
            assert found.severity[name] == pytest.approx(models[name].predict(row[None])[0, 1], abs=1e-3)
        quality = models[QUALITY]
        assert found.quality == pytest.approx(quality.model.predict(row[None, quality.selected])[0], abs=1e-5)
        assert found.numbers == {QUALITY: found.quality, **found.severity}


def test_the_severity_of_a_leaf_is_the_mean_strength_of_its_copies() -> None:
    from embedded.classifier import Forest

    features = np.array([[0.0]] * 3 + [[1.0]] * 4, np.float32)
    strength = np.array([0, 0, 0.3, 0.4, 0.6, 0.8, 0.0])
    found = Forest(2, 2, 1).fit(features, (strength > 0) * 1.0, strength).predict(features[[0, 6]])
    assert found[:, 1] == pytest.approx([0.1, 0.45])
    balanced = [(1 / 4) / (1 / 4 + 2 / 3), (3 / 4) / (3 / 4 + 1 / 3)]
    assert found[:, 0] == pytest.approx(balanced)


def test_the_trees_of_the_package_know_the_defects_that_are_made() -> None:
    forests = Forests.read(FILE)
    assert forests.targets == (*(defect.name for defect in DEFECTS if defect.causes and defect.visible), QUALITY)
    with pytest.raises(KeyError):
        predict({})


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
        return predict(features).log_odds[defect]

    assert odds(clip) > odds("clean") + 1
