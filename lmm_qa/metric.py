"""The mean quality of generated clips as a torchmetrics metric: update, compute, reset, synchronised across ranks.

    metric = VideoQuality(fps=25)
    metric.update(videos)         # (B, T, 3, H, W) or (B, T, H, W, 3), as for `Rater.rate_frames`
    metric.compute()              # mean score of all clips of all ranks

Needs the extra `metrics`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lmm_qa.errors import MissingExtra
from lmm_qa.rater import Rater

try:
    from torchmetrics import Metric
except ModuleNotFoundError:
    raise MissingExtra("torchmetrics", "metrics", "lmm_qa.metric") from None

if TYPE_CHECKING:
    from lmm_qa.video.frame_array import FramesInMemory


class VideoQuality(Metric):
    """Mean score of clips, on `rater.settings.scale`; NaN before the first update."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    total: torch.Tensor
    count: torch.Tensor

    def __init__(self, rater: Rater | None = None, *, fps: float, **options: Any) -> None:
        """
        Args:
            rater: by default the model that ships with the package.
            fps: frames per second of all clips.
            options: of `torchmetrics.Metric`.
        """
        super().__init__(**options)
        self.rater = rater or Rater.from_pretrained()
        self.fps = fps
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, frames: FramesInMemory) -> None:
        """Rate clips; arguments and errors as for `Rater.rate_frames`."""
        scores = self.rater.reward(frames, self.fps).to(self.total.device)
        self.total += scores.sum()
        self.count += len(scores)

    def compute(self) -> torch.Tensor:
        """The mean score of all clips since the last reset, a scalar."""
        return self.total / self.count
