"""python -m pytest tests/scripts/test_compare_peers.py

Metrics and storage of the comparison with classical measures; the measures themselves are not needed.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import SCRIPTS
from scipy.stats import spearmanr

from lmm_qa.errors import ScoresError

CAUSES = {"blur": 0.9, "jpeg": 0.7, "h264": 0.6, "stall": 0.5}


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Six sources, each with a clean copy, each cause at two strengths, and a pair."""
    rng = np.random.default_rng(0)
    return [
        {
            "clip": f"{source}--{causes}{strength}",
            "causes": causes,
            "strengths": [strength] * len(causes),
            "mos": 5 - 4 * sum(CAUSES[cause] * strength for cause in causes) / 2 - rng.uniform(0, 0.8),
        }
        for source in range(6)
        for causes in ([], *([cause] for cause in CAUSES), ["blur", "jpeg"])
        for strength in ((0.5, 1.0) if len(causes) == 1 else (1.0,))
    ]


def rater(rater_id: str) -> Any:
    return Namespace(rater_id=rater_id, raw_rater_id=rater_id)


def of(rows: list[dict[str, Any]], *causes: list[str]) -> list[int]:
    return [place for place, row in enumerate(rows) if row["causes"] in causes]


def test_a_cause_is_evaluated_on_its_single_copies_and_the_clean_ones(rows: list[dict[str, Any]]) -> None:
    import compare_peers

    mos = np.array([row["mos"] for row in rows])
    noisy = mos + np.random.default_rng(1).normal(0, 0.5, len(mos))
    found = compare_peers.metrics_by_cause(rows, {"lmm_qa": noisy, "reversed": -mos, "constant": np.ones(len(mos))})
    expected = {cause: of(rows, [], [cause]) for cause in CAUSES} | {
        "all picture": of(rows, [], ["blur"]),
        "all encoder": of(rows, [], ["jpeg"], ["h264"]),
        "all player": of(rows, [], ["stall"]),
        "pairs": of(rows, ["blur", "jpeg"]),
    }
    assert found.keys() == expected.keys()
    for name, part in expected.items():
        assert found[name]["n"] == len(part)
        assert found[name]["lmm_qa"]["srcc"] == pytest.approx(spearmanr(noisy[part], mos[part]).statistic)
        assert found[name]["reversed"]["srcc"] == pytest.approx(-1)
        assert found[name]["constant"] is None


def test_a_better_peer_is_reported_on_the_causes_that_it_is_designed_for(rows: list[dict[str, Any]]) -> None:
    import compare_peers

    mos = np.array([row["mos"] for row in rows])
    ours, theirs = mos.copy(), -mos
    for cause in ("jpeg", "stall"):  # the peers are designed for the first only
        ours[of(rows, [cause])], theirs[of(rows, [cause])] = 9.0, mos[of(rows, [cause])]
    theirs[of(rows, [])] = mos[of(rows, [])]
    by_cause = compare_peers.metrics_by_cause(rows, {"lmm_qa": ours, "NIQE": theirs})
    named = compare_peers.rater_not_better(by_cause, ["NIQE"])
    assert [each.partition(" 1.000")[0] for each in named] == ["jpeg: NIQE"]


def test_a_subset_has_every_cause_in_proportion(rows: list[dict[str, Any]]) -> None:
    import compare_peers

    assert compare_peers.stratified(rows, len(rows), 0) == compare_peers.stratified(rows, 999, 0) == rows
    half, again, other = (compare_peers.stratified(rows, 30, seed) for seed in (0, 0, 1))
    for causes in ([], *([cause] for cause in CAUSES), ["blur", "jpeg"]):
        assert len(of(half, causes)) == len(of(rows, causes)) / 2
    assert half == sorted(half, key=rows.index) == again != other


def test_scores_survive_an_interruption(tmp_path: Path) -> None:
    import compare_peers

    path, contents = tmp_path / "scores.jsonl", {"a.mp4": "sha256:a", "b.mp4": "sha256:b"}
    scores = compare_peers.ScoreStore(path, contents)
    scores.add("a.mp4", "NIQE 1", -3.5)
    scores.add("b.mp4", "NIQE 1", "ValueError: too small")
    with path.open("a") as file:
        file.write('{"clip": "b.mp4", "content_')
    again = compare_peers.ScoreStore(path, contents | {"b.mp4": "sha256:other"})
    again.add("b.mp4", "NIQE 1", -4.0)
    rows = [again.get("a.mp4", "NIQE 1"), compare_peers.ScoreStore(path, contents).get("b.mp4", "NIQE 2")]
    assert rows[0] is not None and rows[0]["score"] == -3.5 and rows[1] is None
    last = compare_peers.ScoreStore(path, contents | {"b.mp4": "sha256:other"}).get("b.mp4", "NIQE 1")
    assert last is not None and last["score"] == -4.0


def test_ratings_of_another_rater_are_refused(tmp_path: Path) -> None:
    import compare_peers

    ratings = tmp_path / "ratings.jsonl"
    ratings.write_text(
        '{"clip": "set/a.mp4", "rater_id": "one", "score": 2.5}\n'
        '{"clip": "set/b.mp4", "rater_id": "one", "error": {"class": "ClipTruncated", "message": "cut"}}\n'
    )
    scores = compare_peers.ScoreStore(tmp_path / "scores.jsonl", {"a.mp4": "sha256:a", "b.mp4": "sha256:b"})
    args, clips = Namespace(ratings=ratings), ["a.mp4", "b.mp4"]
    with pytest.raises(ScoresError, match=r"by rater one, but the rater to be timed is other"):
        compare_peers.score_rater(scores, tmp_path, clips, rater("other"), args)
    compare_peers.score_rater(scores, tmp_path, clips, rater("one"), args)
    rated, failed = (scores.get(clip, "one") or {} for clip in clips)
    assert rated["score"] == 2.5 and "error" in failed
    with pytest.raises(ScoresError, match=r"lacks 1 of the clips, such as c\.mp4"):
        compare_peers.score_rater(scores, tmp_path, [*clips, "c.mp4"], rater("one"), args)
