"""A process ends with its launcher."""

import os
import subprocess
import sys
import time

import pytest

LAUNCHER = """
import os, sys, time
from megatron_prefix.platform import end_with_parent

ready, is_ready = os.pipe()
child = os.fork()
if not child:
    os.close(1)  # whoever reads the launcher's output does not wait for the child
    if sys.argv[1] == "ends":
        end_with_parent()
    os.write(is_ready, b"1")
    time.sleep(60)
    os._exit(0)
os.read(ready, 1)
print(child, flush=True)
os._exit(0)
"""


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="the call exists on Linux only")
@pytest.mark.parametrize("way", ["ends", "stays"])
def test_a_child_ends_with_its_launcher_if_it_asked_to(way):
    launcher = subprocess.run(
        [sys.executable, "-c", LAUNCHER, way], stdout=subprocess.PIPE, check=True, text=True
    )
    child = int(launcher.stdout)
    if way == "stays":
        assert is_alive(child)
        os.kill(child, 9)
        return
    deadline = time.monotonic() + 30
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(child)
