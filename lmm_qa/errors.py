"""All errors that lmm_qa raises on purpose, in one tree.

    LmmQaError
    |-- UsageError            the caller asked for something that cannot be done (exit code 2)
    |   |-- ConfigError       a prompt, config or rater file is invalid
    |   |-- ManifestError     a list of clips is invalid (file:line)
    |   `-- MissingExtra      an optional dependency is needed; the message gives the pip command
    |-- ModelError            a model, processor or adapter cannot be loaded or does not fit
    |   `-- LevelTokenError   a level word is not exactly one token after the prompt's stem
    |-- TrainingError         a training run cannot start or continue: unreadable clips, a loss that is not finite, ...
    |-- ResultsError          ratings cannot be written or read back
    |-- RankLost              another process of a distributed run has died or cannot be reached
    |-- ServerLost            a served model does not answer any more
    |-- ScoresError           scores cannot be evaluated, calibrated or submitted: too few, constant, missing, ...
    `-- ClipError             one clip cannot be rated; becomes that clip's error row, never ends a run
        |-- ClipNotFound      the file does not exist
        |-- ClipUnreadable    no decoder finds a video in it
        |-- ClipTruncated     the stream ends early: the message says how many of how many frames were read
        |-- ClipTimeout       decoding took longer than the time limit
        |-- DecoderCrashed    the decoding process died (a segmentation fault, out of memory)
        |-- ServerError       a served model cannot rate the clip; the message has the server's answer
        `-- InternalError     a bug in lmm_qa showed while the clip was read; the message asks for a report

Messages say what is wrong, where, the value received, and what to do.
"""

from __future__ import annotations

import re
import traceback


class LmmQaError(Exception):
    """Base of all errors raised on purpose by this package."""


class UsageError(LmmQaError):
    """The caller asked for something that cannot be done."""


class ConfigError(UsageError):
    """A prompt, config or rater file is invalid."""


class ManifestError(UsageError):
    """A list of clips is invalid."""


class MissingExtra(UsageError):
    """An optional dependency is needed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed: pip install 'lmm-qa[{extra}]'")


class ModelError(LmmQaError):
    """A model, processor or adapter cannot be loaded or does not fit."""


class LevelTokenError(ModelError):
    """A level word is not exactly one token after the prompt's stem."""


class TrainingError(LmmQaError):
    """A training run cannot start or continue."""


class ResultsError(LmmQaError):
    """Ratings cannot be written or read back."""


class RankLost(LmmQaError):
    """Another process of a distributed run has died or cannot be reached."""


class ServerLost(LmmQaError):
    """A served model does not answer any more."""


class ScoresError(LmmQaError):
    """Scores cannot be evaluated, calibrated or submitted."""


class ClipError(LmmQaError):
    """One clip cannot be rated."""


class ClipNotFound(ClipError):
    """The file does not exist."""


class ClipUnreadable(ClipError):
    """No decoder finds a video in it."""


class ClipTruncated(ClipError):
    """The stream ends before its declared length."""


class ClipTimeout(ClipError):
    """Decoding took longer than the time limit."""


class DecoderCrashed(ClipError):
    """The decoding process died."""


class ServerError(ClipError):
    """A served model cannot rate the clip."""


class InternalError(ClipError):
    """A bug in lmm_qa showed while one clip was read."""


def describe_exception(error: BaseException) -> str:
    """Return "Type: message (file:line)" of an unexpected exception, the line being the one that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def plural(number: int, noun: str = "clip") -> str:
    """`1 clip`, `2 clips`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def address_in(path: str) -> str | None:
    """The URL (RFC 3986, 3.1) in a path, which may have merged its slashes; None for a path, also one with a drive."""
    address = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", path, re.DOTALL)
    return "://".join(address.groups()) if address else None


def first_line(error: BaseException) -> str:
    """Return "Type: first line of the message" of an exception of a library, or the type alone."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
