"""The programs of the project, run in this process: as from the command line, but the imports are paid for once."""

import io
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

from hydra.core.global_hydra import GlobalHydra

ROOT = Path(__file__).parents[1]


def run_program(script: str, *arguments: str) -> str:
    """What a program prints.

    Args:
        script: Its path below the root of the project, such as ``dreamer/train.py``.
        arguments: Of the command line.

    Raises:
        SystemExit: if it ends with another exit status than 0.
    """
    path, printed = str(ROOT / script), io.StringIO()
    GlobalHydra.instance().clear()  # of a program that ran before
    with patch.object(sys, "argv", [path, *arguments]), redirect_stdout(printed):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
    return printed.getvalue()
