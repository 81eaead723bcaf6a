"""Examples that need neither PyTorch nor JAX; those that do are run by the tests of those."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_the_notebook_draws_its_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed here")
    drawn = tmp_path / "curves.png"
    command = [sys.executable, str(EXAMPLES / "curves.py"), str(drawn)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert drawn.read_bytes().startswith(b"\x89PNG")
    for first, last in ast.literal_eval(done.stdout).values():
        assert last < 0.5 < first
