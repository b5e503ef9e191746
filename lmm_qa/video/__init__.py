"""From a video file to the frames that a model sees: checks, sampling, strict decoding, measurements per frame."""
