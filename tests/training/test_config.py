"""python -m pytest tests/training/test_config.py"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from paths import ROOT
from pydantic.fields import FieldInfo

from lmm_qa.config import Sampling, Settings, View
from lmm_qa.errors import ConfigError, ModelError, UsageError
from lmm_qa.model.prompt import Prompt, load_prompt
from lmm_qa.model.rater_config import RaterConfig
from lmm_qa.model.source import resolve_model
from lmm_qa.training.config import RENAMED_KEYS, RatingConfig, TrainingConfig

CONFIGS = ROOT / "configs"
TRAINING_CONFIGS = sorted(CONFIGS.glob("*.yaml"))
ACCELERATE_CONFIGS = sorted((CONFIGS / "accelerate").glob("*.yaml"))

HUB = {
    "qwen2_vl_2b": "Qwen/Qwen2-VL-2B-Instruct",
    "qwen2_vl_7b": "Qwen/Qwen2-VL-7B-Instruct",
    "qwen2_5_vl_3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen2_5_vl_7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3_vl_4b": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen3_vl_8b": "Qwen/Qwen3-VL-8B-Instruct",
}

SMALL: dict[str, Any] = {
    "model": {"backbone": "some/model"},
    "data": {"train": [{"path": "a.csv", "scale": [0, 5]}]},
    "training": {"output_dir": "runs/a"},
}

Place = tuple[str, ...]


def small(**sections: Any) -> TrainingConfig:
    return TrainingConfig.parse({**SMALL, **sections}, "test")


def write(path: Path, values: Any) -> Path:
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


# --- shipped files ---------------------------------------------------------------------------------------------------


def comments(path: Path) -> list[tuple[Place, str]]:
    """The path of each key in a YAML file (list items have none of their own), with the comment above it."""
    lines = path.read_text(encoding="utf-8").splitlines()

    def above(line: int) -> str:
        found: list[str] = []
        while line and (comment := re.fullmatch(r"\s*(?:- )?# ?(.*)", lines[line - 1])):
            found.insert(0, comment[1])
            line -= 1
        return " ".join(found)

    def walk(node: yaml.Node, place: Place) -> Iterator[tuple[Place, str]]:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                yield (*place, key.value), above(key.start_mark.line)
                yield from walk(value, (*place, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                yield from walk(item, place)

    return list(walk(yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader), ()))


def fields(model: type[Settings], place: Place = ()) -> Iterator[tuple[Place, FieldInfo]]:
    """The path of each key that a configuration may have."""
    for name, field in model.model_fields.items():
        yield (*place, name), field
        for inner in settings_in(field.annotation):
            yield from fields(inner, (*place, name))


def settings_in(annotation: Any) -> list[type[Settings]]:
    if not get_args(annotation):
        return [annotation] if isinstance(annotation, type) and issubclass(annotation, Settings) else []
    return [found for part in get_args(annotation) for found in settings_in(part)]


def plain(value: Any) -> Any:
    """A default value as YAML would load it."""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


FIELDS = dict(fields(TrainingConfig))
TYPE_AND_DEFAULT = re.compile(r"\((?P<kind>[^();]+); (?:(?P<required>required)|default (?P<default>[^()]+))\)$")


@pytest.mark.parametrize("path", TRAINING_CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_loads_by_path_and_by_name(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainingConfig.load(path, ["data.root=/videos"])
    assert config.data.root == Path("/videos")
    monkeypatch.chdir(tmp_path)
    assert TrainingConfig.load(Path(path.stem), ["data.root=/videos"]) == config


@pytest.mark.parametrize("path", TRAINING_CONFIGS, ids=lambda path: path.stem)
def test_each_key_has_a_comment_with_its_meaning_type_and_default(path: Path) -> None:
    for place, comment in comments(path):
        if place in FIELDS and settings_in(FIELDS[place].annotation) and len(place) == 1:
            assert len(comment) > 10, f"{path.name}: {place} has no comment"
            continue
        match = TYPE_AND_DEFAULT.search(comment)
        assert match, f"{path.name}: the comment of {place} does not end in (type; default ...): {comment!r}"
        assert len(comment) - len(match[0]) > 5, f"{path.name}: the comment of {place} has no description"
        if place == ("extends",):
            continue
        field = FIELDS[place]
        assert bool(match["required"]) == field.is_required(), f"{path.name}: {place}"
        if not field.is_required():
            default = plain(field.get_default(call_default_factory=True))
            assert yaml.safe_load(match["default"]) == pytest.approx(default), f"{path.name}: {place}"


def test_comments_are_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "# One (text; required)\na: 1\nb: 2\nc:\n- # Two\n  # lines\n  d: 3\n  e: 4\n")
    assert comments(path) == [
        (("a",), "One (text; required)"),
        (("b",), ""),
        (("c",), ""),
        (("c", "d"), "Two lines"),
        (("c", "e"), ""),
    ]


def test_a_tuned_rater_starts_without_the_weight_of_its_backbone() -> None:
    """Training does not see the measured quality beside the model's distribution."""
    config = RatingConfig().rater_config(RaterConfig(evidence_weight=0.5), (1, 5))
    assert config.evidence_weight == 0


def test_one_file_lists_every_key() -> None:
    listed = {place for place, _ in comments(CONFIGS / "thqa.yaml")}
    elsewhere = (("data", "validation"), ("rating", "prompt"))  # keys as in data.train, and as in prompts/
    wanted = {place for place in FIELDS if not (len(place) > 2 and place[:2] in elsewhere)}
    assert len(wanted) > 60
    assert wanted - listed == set()


def test_each_backbone_has_a_configuration_for_each_setup() -> None:
    cards = {"qlora": "4bit", "lora": None, "fsdp": None, "vision": None}
    named = {f"thqa_{backbone}_{card}" for backbone in HUB for card in cards}
    bases = {"thqa", "thqa_qlora", "thqa_fsdp", "thqa_vision", "thqa_qrealign", "konvid", "embedded_lora"}
    with_sound = {"thqa_qwen2_5_omni_7b_lora"}
    assert {path.stem for path in TRAINING_CONFIGS} == named | bases | with_sound
    for backbone, hub in HUB.items():
        for card, quantization in cards.items():
            config = TrainingConfig.load(Path(f"thqa_{backbone}_{card}"))
            assert (config.model.backbone, config.model.quantization) == (hub, quantization)
            assert config.training.output_dir == Path(f"runs/thqa_{backbone}_{card}")
            assert config.scale == (0, 5)
            assert config.tuning.vision == config.tuning.merger == (card == "vision")
            assert config.training.gradient_checkpointing
            processes = 4 if card == "fsdp" else 1
            assert config.training.batch_size * config.training.gradient_accumulation_steps * processes == 16


def test_the_configuration_with_sound_gives_it_with_the_view_of_the_face() -> None:
    config = TrainingConfig.load(Path("thqa_qwen2_5_omni_7b_lora"))
    assert isinstance(config.rating.prompt, str) and load_prompt(config.rating.prompt).sound
    assert config.rating.views is not None and [view.kind for view in config.rating.views] == ["face", "whole"]
    assert not config.uses_vision_cache(patch_grid=True) and config.scale == (0, 5)


def test_the_published_thqa_tables_load(shared_dir: Path, tmp_path: Path) -> None:
    from lmm_qa.training.dataset import load

    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        table = f"thqa_ntire_{name}.csv"
        (tmp_path / table).write_bytes((shared_dir / "thqa" / table).read_bytes())
    splits = load(TrainingConfig.load(Path("thqa"), [f"data.root={tmp_path}"]).data, seed=0)
    assert len(splits.validation) == 1714
    assert len(splits.train) + len(splits.calibration) == 8927 - 55
    assert splits.validation[0].path.parent == tmp_path / "val"
    assert splits.train[0].path.parent == tmp_path / "train"


def test_the_layout_of_konvid_loads(tmp_path: Path) -> None:
    from lmm_qa.training.dataset import load

    (tmp_path / "KoNViD_1k_videos").mkdir()
    for number in range(40):
        (tmp_path / f"KoNViD_1k_videos/{3339962800 + number}.mp4").touch()
    rows = [f"{3339962800 + number},{1 + number / 10}" for number in range(40)]
    write(tmp_path / "KoNViD_1k_mos.csv", "\n".join(['"flickr_id","mos"', *rows]))
    config = TrainingConfig.load(Path("konvid"), [f"data.root={tmp_path}"])
    splits = load(config.data, seed=0)
    assert [len(splits.train), len(splits.validation), len(splits.calibration)] == [32, 4, 4]
    assert all(example.path.is_file() for example in splits.train)
    assert config.scale == (1, 5)


# --- accelerate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_accepts_the_files(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no", "set by model.dtype instead"
    options = launch_command_parser().parse_args(["--config_file", str(path), "scripts/train.py"])
    for key in (*config.fsdp_config, *config.deepspeed_config):
        assert hasattr(options, key), f"{path.name}: accelerate has no option {key}"
    for place, comment in comments(path):
        assert place[-1] in {"fsdp_config", "deepspeed_config"} or TYPE_AND_DEFAULT.search(comment), (
            f"{path.name}: {place}"
        )


def test_accelerate_launches_as_configured() -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    def launched(name: str) -> Any:
        path = CONFIGS / "accelerate" / f"{name}.yaml"
        options = launch_command_parser().parse_args(["--config_file", str(path), "scripts/train.py"])
        return _validate_launch_command(options)[0]

    assert {path.stem for path in ACCELERATE_CONFIGS} == {
        "one_gpu",
        "one_machine",
        "several_machines",
        "fsdp",
        "deepspeed",
    }
    assert (launched("one_gpu").num_processes, launched("one_gpu").multi_gpu) == (1, False)
    assert (launched("one_machine").num_processes, launched("one_machine").multi_gpu) == (4, True)
    several = launched("several_machines")
    assert (several.num_processes, several.num_machines, several.multi_gpu) == (8, 2, True)
    assert (several.main_process_ip, several.main_process_port) == ("10.0.0.1", 29500)
    assert launched("deepspeed").use_deepspeed
    assert launched("deepspeed").zero_stage == 2


def test_fsdp_is_configured_for_a_frozen_model_with_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env
    from torch.distributed.fsdp import StateDictType

    path = CONFIGS / "accelerate" / "fsdp.yaml"
    options = launch_command_parser().parse_args(["--config_file", str(path), "scripts/train.py"])
    options = _validate_launch_command(options)[0]
    assert options.use_fsdp
    for name, value in prepare_multi_gpu_env(options).items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert not plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing
    assert plugin.auto_wrap_policy is not None


# --- extends ---------------------------------------------------------------------------------------------------------


def test_a_file_overrides_the_one_that_it_extends(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", {**SMALL, "loss": {"plcc": 0.5, "fidelity": 0.25}, "model": {"backbone": "a/b"}})
    (tmp_path / "inner").mkdir()
    middle = {"extends": "../base.yaml", "loss": {"plcc": 0.0}, "model": {"quantization": "4bit"}}
    write(tmp_path / "inner/middle.yaml", middle)
    table = {"path": "b.csv", "scale": [1, 5]}
    last = {"extends": "middle.yaml", "data": {"train": [table]}, "model": {"quantization": None}}
    path = write(tmp_path / "inner/last.yaml", last)
    config = TrainingConfig.load(path, ["loss.fidelity=0.75"])
    assert (config.loss.plcc, config.loss.fidelity) == (0.0, 0.75)
    assert (config.model.backbone, config.model.quantization) == ("a/b", None)
    assert [table.path for table in config.data.train] == ["b.csv"]
    assert TrainingConfig.load(tmp_path / "inner/middle.yaml").model.quantization == "4bit"


def test_a_file_extends_a_shipped_one_by_name(tmp_path: Path) -> None:
    config = TrainingConfig.load(write(tmp_path / "mine.yaml", {"extends": "thqa_qlora", "training": {"epochs": 1}}))
    shipped = TrainingConfig.load(CONFIGS / "thqa_qlora.yaml")
    assert config.training.epochs == 1
    assert config.model_copy(update={"training": shipped.training}) == shipped


def test_a_file_cannot_extend_itself_or_a_missing_file(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", {"extends": "b.yaml"})
    write(tmp_path / "b.yaml", {"extends": "a.yaml"})
    with pytest.raises(ConfigError, match=r"[ab]\.yaml extends itself, by way of [ab]\.yaml"):
        TrainingConfig.load(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match=r"cannot read .*gone\.yaml: No such file"):
        TrainingConfig.load(write(tmp_path / "c.yaml", {"extends": "gone.yaml"}))


# --- reading and overriding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "place", "value"),
    [
        ("training.learning_rate=2e-4", "training.learning_rate", 2e-4),
        ("training.report_to=[tensorboard, trackio]", "training.report_to", ("tensorboard", "trackio")),
        ("rating.scale=[1, 5]", "rating.scale", (1.0, 5.0)),
        ("rating.sampling.frames=4", "rating.sampling.frames", 4),
        ("model.quantization=4bit", "model.quantization", "4bit"),
        ("model.revision=a=b", "model.revision", "a=b"),
        ("training.cache_vision_features=null", "training.cache_vision_features", None),
        ("training.arguments.logging_steps=1", "training.arguments", {"logging_steps": 1}),
        ("data.root=/a b", "data.root", Path("/a b")),
    ],
)
def test_an_override_is_applied(tmp_path: Path, change: str, place: str, value: object) -> None:
    found: Any = TrainingConfig.load(write(tmp_path / "a.yaml", SMALL), [change])
    for name in place.split("."):
        found = getattr(found, name)
    assert found == value


def test_an_override_reaches_into_a_list_and_the_last_one_wins(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", SMALL)
    config = TrainingConfig.load(
        path, [f"data.train.0.{change}" for change in ("path=b.csv", "path=c.csv", "std=spread")]
    )
    (table,) = config.data.train
    assert (table.path, table.std, table.scale) == ("c.csv", "spread", (0, 5))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("data.root", "an override has the form section.key=value, received 'data.root'"),
        ("=3", "received '=3'"),
        ("loss.plcc=[1", r"received 'loss.plcc=\[1'"),
        ("data.train.1.path=b.csv", "'data.train.1.path=b.csv': there is no '1' to change"),
        ("data.train.first.path=b.csv", "there is no 'first' to change"),
        ("model.backbone.name=b", "there is no 'name' to change"),
        ("loss.plc=1", r"loss.plc: Extra inputs are not permitted \(received 1\)"),
        ("losses.plcc=1", r"losses: Extra inputs are not permitted"),
        ("loss.plcc=much", r"loss.plcc: .* \(received 'much'\)"),
        ("training.epochs=0", r"training.epochs: Input should be greater than 0 \(received 0\)"),
        ("data.train=[]", r"data.train: .* at least 1 item"),
    ],
)
def test_an_invalid_override_is_named(tmp_path: Path, change: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        TrainingConfig.load(write(tmp_path / "a.yaml", SMALL), [change])


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_a_renamed_key_is_refused_with_its_new_name(tmp_path: Path, old: str, new: str) -> None:
    path = write(tmp_path / "a.yaml", SMALL)
    with pytest.raises(ConfigError, match=rf"a\.yaml cannot be used:\n  {old} was renamed to {new}$"):
        TrainingConfig.load(path, [f"{old}=1"])
    assert tuple(new.split(".")) in FIELDS and tuple(old.split(".")) not in FIELDS


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("model: [", "is not valid YAML"),
        ("", "cannot be used"),
        ("- 1", "cannot be used"),
        ("model: {backbone: a/b}", "data: Field required"),
    ],
)
def test_an_invalid_file_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = write(tmp_path / "a.yaml", text)
    with pytest.raises(ConfigError, match=complaint) as refused:
        TrainingConfig.load(path)
    assert str(path) in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nothing\.yaml: No such file"):
        TrainingConfig.load(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="cannot read no_such_config"):
        TrainingConfig.load(Path("no_such_config"))


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"model": {"backbone": "a/b", "quantization": "8bit"}, "tuning": {"method": "full"}}, "cannot be trained"),
        (
            {"training": {"output_dir": "a", "cache_vision_features": True}, "tuning": {"vision": True}},
            "merger are frozen",
        ),
        (
            {"training": {"output_dir": "a", "cache_vision_features": True}, "tuning": {"merger": True}},
            "merger are frozen",
        ),
        ({"loss": {"cross_entropy": 0, "fidelity": 0}}, "must have a weight above 0"),
    ],
)
def test_invalid_combinations_are_refused(sections: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        small(**sections)


# --- the resulting rater.json ----------------------------------------------------------------------------------------


def test_the_scale_is_that_of_the_tables_unless_it_is_set() -> None:
    both = {"train": [{"path": "a.csv", "scale": [0, 5]}, {"path": "b.csv", "scale": [1, 5]}]}
    watched = {"train": [both["train"][0]], "validation": [both["train"][1]]}
    assert small().scale == (0, 5)
    assert small(data=watched).scale == (0, 5), "the scale of the training tables"
    assert small(data=both, rating={"scale": [0, 100]}).scale == (0, 100)
    with pytest.raises(ConfigError, match=r"the scales \[\(0.0, 5.0\), \(1.0, 5.0\)\]: choose with rating.scale"):
        _ = small(data=both).scale


def test_a_plain_backbone_gets_the_general_defaults(family_dir: Callable[[str], Path]) -> None:
    folder = family_dir("qwen2_vl")
    rater = small(model={"backbone": str(folder)}).rater_config()
    assert rater.backbone == str(folder)
    assert rater.scale == (0, 5)
    assert (rater.prompt, rater.sampling, rater.views) == (load_prompt("talking_head"), Sampling(), (View(),))


def test_the_configuration_overrides_the_defaults(family_dir: Callable[[str], Path]) -> None:
    rating = {"prompt": "qalign", "sampling": {"frames": 4}, "views": [{"kind": "crop"}], "scale": [1, 9]}
    rater = small(model={"backbone": str(family_dir("qwen2_vl"))}, rating=rating).rater_config()
    assert rater.prompt == load_prompt("qalign")
    assert (rater.sampling, rater.views, rater.scale) == (Sampling(frames=4), (View(kind="crop"),), (1, 9))
    own = {"question": "Is it sharp?", "stem": "It is"}
    rater = small(model={"backbone": str(family_dir("qwen2_vl"))}, rating={"prompt": own}).rater_config()
    assert rater.prompt == Prompt.parse(own, "test")
    with pytest.raises(ConfigError, match="no_such_prompt"):
        small(model={"backbone": str(family_dir("qwen2_vl"))}, rating={"prompt": "no_such_prompt"}).rater_config()


def test_the_embedded_base_keeps_its_sampling_and_views() -> None:
    embedded = resolve_model(None)
    rater = small(model={"backbone": "embedded"}).rater_config()
    assert rater.backbone == embedded.backbone
    assert (Path(str(rater.backbone)) / "model.safetensors").is_file()
    assert (rater.sampling, rater.views) == (embedded.settings.sampling, embedded.settings.views)
    assert rater.sampling != Sampling()
    assert rater.scale == (0, 5)


def test_an_invalid_backbone_is_refused(family_dir: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    write(
        tmp_path / "adapter/adapter_config.json", json.dumps({"base_model_name_or_path": str(family_dir("qwen2_vl"))})
    )
    with pytest.raises(ConfigError, match="is an adapter: merge it first"):
        small(model={"backbone": str(tmp_path / "adapter")}).rater_config()
    with pytest.raises(UsageError, match="no model directory"):
        small(model={"backbone": str(tmp_path / "nowhere")}).rater_config()
    with pytest.raises(ModelError, match="is not a model directory"):
        (tmp_path / "empty").mkdir()
        small(model={"backbone": str(tmp_path / "empty")}).rater_config()
