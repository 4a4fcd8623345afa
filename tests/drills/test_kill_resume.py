import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.drill
def test_twenty_random_kills_end_bit_identical() -> None:
    command = [sys.executable, Path(__file__).with_name("kill_resume.py"), "--kills", "20", "--at", "draft", "commit"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
