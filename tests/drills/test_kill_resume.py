import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.drill
@pytest.mark.parametrize("task", ["toy", "model"])
def test_twenty_kills_end_bit_identical(task: str) -> None:
    command = [sys.executable, str(Path(__file__).with_name("kill_resume.py")), "--task", task, "--kills", "20"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
