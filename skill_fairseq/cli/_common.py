"""What all commands share."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Callable

Main = Callable[..., int]


def run(main: Callable[..., int]) -> Main:
    """Decorate a command's `main(argv=None) -> int`: what the user can mend becomes one line on stderr and
    exit code 2.

    ValueError and OSError (FileNotFoundError included) are reported without a traceback; Ctrl-C gives exit
    code 130, as shells expect. Any other exception is a defect of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except (ValueError, OSError) as error:
            message = " ".join(str(error).split()) or type(error).__name__
            print(f"error: {message}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return guarded
