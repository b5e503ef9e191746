"""python -m pytest tests/test_guides.py

The Python in docs/guides/integrations.md runs as it stands, from top to bottom.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from paths import EMBEDDED, ROOT
from rating_rows import rating_row

from lmm_qa.files.tables import write_rows

GUIDE = ROOT / "docs" / "guides" / "integrations.md"
LIBRARIES = ("duckdb", "pandas", "tensorboard", "torchmetrics")

pytestmark = pytest.mark.skipif(not any(EMBEDDED.rglob("*.safetensors")), reason=f"no embedded model at {EMBEDDED}")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder in which the guide's code ran, and its variables."""
    for library in LIBRARIES:
        pytest.importorskip(library, reason=f"{library} is not installed: pip install -e '.[dev]'")
    folder = tmp_path_factory.mktemp("guide")
    video = {"width": 512, "height": 512, "fps": 25.0, "frames": 50, "duration": 2.0}
    stall = [{"defect": "stall", "probability": 0.8, "seconds": [[0.5, 1.25]]}, {"defect": "blur", "probability": 0.7}]
    rows = [
        rating_row("person/a.mp4", 4.2, level="good", video=video),
        rating_row("b.mp4", 2.1, level="poor", video=video) | {"found": [{"seconds": None, **one} for one in stall]},
        rating_row("broken.mp4", None),
    ]
    write_rows(folder / "ratings.jsonl", rows)
    write_rows(folder / "ratings.parquet", rows)
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, block in enumerate(blocks):
            exec(compile(block, f"{GUIDE.name}, block {number + 1}", "exec"), names)
    return folder, names


def test_tables(ran: tuple[Path, dict[str, Any]]) -> None:
    _, names = ran
    clips = ["person/a.mp4", "b.mp4", "broken.mp4"]
    assert (
        [row["clip"] for row in names["rows"]] == list(names["nested"]["clip"]) == list(names["flat"]["clip"]) == clips
    )
    assert list(names["worst"]["clip"])[:2] == ["b.mp4", "person/a.mp4"]
    assert names["good"]["clip"] == ["person/a.mp4"]
    assert names["blurred"] == [("b.mp4", 2.1, 0.1)]
    assert names["clips_by_defect"] == [("blur", 1), ("stall", 1)]


def test_frames_in_memory(ran: tuple[Path, dict[str, Any]]) -> None:
    _, names = ran
    assert len(names["ratings"]) == 2
    assert names["best"].shape == (16, 3, 96, 96)
    rewards = names["rater"].reward(names["videos"], fps=16)
    assert float(names["metric"].compute()) == pytest.approx(float(rewards.mean()), abs=1e-4)


def test_a_training_loop_logs_to_tensorboard(ran: tuple[Path, dict[str, Any]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, names = ran
    (events,) = (folder / "runs").rglob("events.out.tfevents*")
    log = EventAccumulator(str(events))
    log.Reload()
    scores = names["rater"].reward(names["videos"], fps=16)
    logged = {tag: [point.value for point in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
    assert logged["quality/mean"] == pytest.approx([float(scores.mean())] * 2, abs=1e-3)
    assert logged["quality/low"][0] < logged["quality/mean"][0] < logged["quality/high"][0]
    rates = [value for tag, values in logged.items() if tag.startswith("defects/") for value in values]
    assert len(rates) > 10
    assert all(0 <= rate <= 1 for rate in rates)


def test_fiftyone_files_have_its_format(ran: tuple[Path, dict[str, Any]]) -> None:
    """`FiftyOneTemporalDetectionDataset`: paths by name, and for the same names label, timestamps, confidence."""
    folder, _ = ran
    data, labels = (json.loads((folder / name).read_text()) for name in ("data.json", "labels.json"))
    assert data == {name: str((folder / "clips" / f"{name}.mp4").absolute()) for name in ("person/a", "b")}
    assert set(labels["labels"]) == set(data)
    assert labels["labels"]["b"] == [
        {"label": "poor", "timestamps": [0, 2.0], "attributes": {"score": 2.1}},
        {"label": "stall", "timestamps": [0.5, 1.25], "confidence": 0.8},
        {"label": "blur", "timestamps": [0, 2.0], "confidence": 0.7},
    ]
