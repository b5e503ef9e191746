"""python -m pytest tests/cli/test_raters.py"""

from __future__ import annotations

from pathlib import Path

from commands import Command

from lmm_qa.model.presets import get_preset, presets
from lmm_qa.model.rater_config import RaterConfig


def test_the_list_has_every_rater_in_one_line(command: Command) -> None:
    done = command("raters")
    assert done.code == 0
    names = [line.split()[0] for line in done.out.splitlines()[2:]]
    assert names == ["embedded", *presets()]


def test_one_rater_with_its_figures_and_its_words(command: Command) -> None:
    facts = {line.split("  ")[0]: line.strip() for line in command("raters", "qrealign-mini").out.splitlines()}
    assert facts["weights"].split()[1] == "q-future/Q-ReAlign-Mini-0.8B"
    assert facts["published"].endswith("LSVQ SRCC / PLCC 0.869 / 0.869 (https://github.com/Q-Future/Q-ReAlign)")
    assert facts["answer"].removeprefix("answer").strip() == "The quality of the video is ..."
    done = command("raters", "embedded")
    assert (done.code, done.out.count("\n")) == (0, 1)
    assert done.out.startswith("embedded ships with the package and rates if there is no --model.")


def test_settings_for_a_local_copy_of_the_weights(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "rater.json"
    for name in ("qrealign-lite", "qwen3.5-4b"):
        file.write_text(command("raters", name, "--json").out)
        assert RaterConfig.read(file) == get_preset(name).settings()


def test_names_that_are_not_known(command: Command) -> None:
    done = command("raters", "qrealign")
    assert done.code == 2
    assert "no published rater is called 'qrealign'; known: qrealign-mini, " in done.err
    assert "give its name" in command("raters", "--json").err
