"""Work for cells that the tests can look into: importable by name, as workers need it."""

import os
import signal
import time
from pathlib import Path


def quick(cell, folder):
    with (Path(cell.settings["log"])).open("a") as log:
        log.write(f"{cell.attack['name']} {os.getpid()}\n")
    return [{"value": cell.seed * 10, "attack": cell.attack["name"]}]


def moody(cell, folder):
    """What the attack's name says."""
    name = cell.attack["name"]
    if name == "raises":
        raise ValueError("a bad\nsetting")
    if name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "hangs":
        time.sleep(600)
    return quick(cell, folder)


def slow(cell, folder):
    rows = quick(cell, folder)
    time.sleep(0.3)
    return rows
