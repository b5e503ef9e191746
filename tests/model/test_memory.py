"""python -m pytest tests/model/test_memory.py"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from lmm_qa.errors import ModelError
from lmm_qa.model import loading, memory
from lmm_qa.model.backbone import Backbone
from lmm_qa.model.loading import check_memory, choose_dtype, choose_model_dtype, count_parameters, estimate_memory
from lmm_qa.model.memory import free_in_cgroups, free_memory
from lmm_qa.model.rater_plan import plan_rater

GB = 10**9

FamilyDir = Callable[[str], Path]


def write_group(folder: Path, names: tuple[str, str], limit: str, usage: int, statistics: str) -> None:
    folder.mkdir(parents=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(statistics)


@pytest.mark.parametrize(
    ("line", "hierarchy", "names", "total"),
    [
        ("0::/batch/job", "", ("memory.max", "memory.current"), ""),
        ("4:cpu,memory:/batch/job", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"),
    ],
)
def test_the_limits_of_all_control_groups_count(
    line: str, hierarchy: str, names: tuple[str, str], total: str, tmp_path: Path
) -> None:
    root = tmp_path / "cgroup"
    cached = f"anon 7\n{total}inactive_file 300\n{total}active_file 20\nworkingset_file 5\n"
    write_group(root / hierarchy / "batch", names, "8000", 5000, cached)
    write_group(root / hierarchy / "batch" / "job", names, "4000", 1500, f"{total}inactive_file 0\n")
    (tmp_path / "groups").write_text(f"9:pids:/elsewhere\n{line}\n")
    assert free_in_cgroups(tmp_path / "groups", root) == [4000 - 1500, 8000 - 5000 + 320]
    (root / hierarchy / "batch" / names[0]).write_text("max\n")
    assert free_in_cgroups(tmp_path / "groups", root) == [4000 - 1500]
    (tmp_path / "groups").write_text("")
    assert free_in_cgroups(tmp_path / "groups", root) == []
    assert free_in_cgroups(tmp_path / "absent", root) == []


def test_free_memory_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=9 * GB))
    monkeypatch.setattr(memory, "free_in_cgroups", lambda: [4 * GB, 5 * GB])
    assert free_memory("cpu") == free_memory("mps") == 4 * GB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GB)
    assert free_memory("cuda:1") == 4 * GB


def test_a_cpu_takes_large_models_in_bfloat16(family_dir: FamilyDir, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(choose_dtype("cpu", None, 2_200_000_000)) == (
        "bfloat16 (2.2 billion parameters: half the memory of float32)"
    )
    assert choose_dtype("cpu", None, 500_000_000).value == "float32"
    assert choose_dtype("cpu", "float32", 10**10).value == "float32"
    model = str(family_dir("qwen2_vl"))
    size = estimate_memory(model, 0, dtype="float32").parameters
    assert count_parameters(model) == size
    assert choose_model_dtype(model, device="cpu").value == "float32"
    small = plan_rater(model, device="cpu")
    assert small.dtype == "float32"
    monkeypatch.setattr(loading, "MAX_FLOAT32_PARAMETERS", size - 1)
    large = plan_rater(model, device="cpu")
    assert large.dtype == "bfloat16"
    assert large.rater_id == plan_rater(model, device="cpu", dtype="bfloat16").rater_id != small.rater_id
    backbone = large.load_backbone()
    assert isinstance(backbone, Backbone)
    assert backbone.choices["dtype"].value == "bfloat16"
    assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.bfloat16}
    assert estimate_memory(model, 0, device="cpu").weights == 2 * size


def test_a_model_that_does_not_fit_is_refused(family_dir: FamilyDir, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(family_dir("qwen2_vl"))
    size = estimate_memory(model, 0, dtype="bfloat16").weights
    monkeypatch.setattr(loading, "free_memory", lambda device: int(1.06 * size))
    check_memory(model, device="cpu", dtype="bfloat16")
    with pytest.raises(ModelError, match=r"does not fit into memory: in float32 .* Use --dtype bfloat16 \("):
        Backbone.load(model, device="cpu", dtype="float32")


def test_the_message_has_the_sizes_of_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """8.29 billion weights, 6.5 of them in linear layers of the language model."""
    from backbones import published

    model = str(published("qwen2.5-vl-7b-instruct"))
    monkeypatch.setattr(loading, "free_memory", lambda device: int(14.5 * GB))
    with pytest.raises(ModelError) as caught:
        check_memory(model, device="cpu", dtype="float32")
    assert str(caught.value) == (
        f"{model!r} does not fit into memory: in float32 it needs 34.8 GB on cpu, where 14.5 GB are free. Use "
        "--quantization 4bit (11.3 GB), a smaller model, or one that is served elsewhere (--model http://HOST:PORT/v1)"
    )
    with pytest.raises(ModelError, match=r"in bfloat16 it needs 17.4 GB .* Use --quantization 4bit \(7\.\d GB\), a"):
        check_memory(model, device="cpu")
    check_memory(model, device="cpu", quantization="4bit")


def test_the_cache_of_the_published_7b_model() -> None:
    """28 layers; keys and values; 4 heads of 128; 2 bytes: 57,344 a token."""
    from backbones import published

    estimate = estimate_memory(str(published("qwen2.5-vl-7b-instruct")), 1319, dtype="bfloat16", device="cpu")
    assert estimate.cache == 1319 * 28 * 2 * 4 * 128 * 2


def test_the_size_of_a_model_on_the_hub(family_dir: FamilyDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub says; without a network, from the files in the local cache."""
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    info = SimpleNamespace(sha="0" * 40, safetensors=SimpleNamespace(total=8_292_166_656))
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: info)
    assert count_parameters("some/model") == 8_292_166_656
    assert choose_model_dtype("some/model", device="cpu").value == "bfloat16"
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    shutil.copytree(family_dir("qwen2_vl"), snapshot)

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    assert count_parameters("some/model", revision=info.sha) == 8_292_166_656, "a known commit is not asked for again"
    assert count_parameters("some/model") == count_parameters(str(family_dir("qwen2_vl")))
