"""Every error that lmm_qa raises on purpose, in one tree.

    LmmQaError
    |-- UsageError            the caller asked for something that cannot be done (exit code 2)
    |   |-- ConfigError       a prompt, config or rater file says something it may not say
    |   |-- ManifestError     a list of clips cannot be understood (file:line)
    |   `-- MissingExtra      an optional dependency is needed; the message gives the pip command
    |-- ModelError            a model, processor or adapter cannot be loaded or does not fit
    |   `-- LevelTokenError   a level word is not exactly one token after the prompt's stem
    |-- TrainingError         a training run cannot begin or go on: unreadable clips, a loss that is not finite, ...
    |-- ResultsError          ratings cannot be written or read back
    |-- ScoresError           scores cannot be evaluated, calibrated or submitted: too few, constant, missing, ...
    `-- ClipError             one clip cannot be rated; becomes that clip's error row, never ends a run
        |-- ClipNotFound      nothing is there
        |-- ClipUnreadable    no decoder finds a video in it
        |-- ClipTruncated     the stream breaks: says how many of how many frames were read
        |-- ClipTimeout       decoding took longer than the time limit
        `-- DecoderCrashed    the decoding process died (a segmentation fault, out of memory)

Messages say what was wrong, where, the value received, and what to do.
"""

from __future__ import annotations


class LmmQaError(Exception):
    """Base of all errors raised on purpose by this package."""


class UsageError(LmmQaError):
    """The caller asked for something that cannot be done."""


class ConfigError(UsageError):
    """A prompt, config or rater file says something it may not say."""


class ManifestError(UsageError):
    """A list of clips cannot be understood."""


class MissingExtra(UsageError):
    """An optional dependency is needed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed: pip install 'lmm-qa[{extra}]'")


class ModelError(LmmQaError):
    """A model, processor or adapter cannot be loaded or does not fit."""


class LevelTokenError(ModelError):
    """A level word is not exactly one token after the prompt's stem."""


class TrainingError(LmmQaError):
    """A training run cannot begin or go on."""


class ResultsError(LmmQaError):
    """Ratings cannot be written or read back."""


class ScoresError(LmmQaError):
    """Scores cannot be evaluated, calibrated or submitted."""


class ClipError(LmmQaError):
    """One clip cannot be rated."""


class ClipNotFound(ClipError):
    """Nothing is there."""


class ClipUnreadable(ClipError):
    """No decoder finds a video in it."""


class ClipTruncated(ClipError):
    """The stream breaks before its declared end."""


class ClipTimeout(ClipError):
    """Decoding took longer than the time limit."""


class DecoderCrashed(ClipError):
    """The decoding process died."""
