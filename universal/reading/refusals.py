"""What cannot be read, said with the line of the user's own code."""

import contextlib
import itertools
import linecache
import sys
import traceback
from pathlib import Path

import torch

LIBRARIES = (
    str(Path(torch.__file__).parent.parent),
    str(Path(__file__).parents[1]),
    str(Path(contextlib.__file__).parent),
)


class Refused(ValueError):
    """What cannot be read: the call, and the line of the user's own code that it stands in."""


def place_of(error: Exception | None = None) -> str:
    """The innermost line of the user's own code that an error came through, or that runs now; "" if there is none."""
    frames = traceback.walk_tb(error.__traceback__) if error else traceback.walk_stack(sys._getframe())
    within = itertools.takewhile(lambda frame: frame[0].f_code.co_qualname != "ComputationGraph._read", frames)
    own = [
        (frame.f_code.co_filename, line) for frame, line in (frames if error else within)
        if not frame.f_code.co_filename.startswith((*LIBRARIES, "<"))
    ]  # fmt: skip
    if not own:
        return ""
    file, line = own[-1] if error else own[0]
    return f" ({Path(file).name}, line {line}: {linecache.getline(file, line).strip()})"
