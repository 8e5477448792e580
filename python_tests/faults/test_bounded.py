"""The bounds of the other fault tests are noticed."""

import os
import sys
import time

from helpers.bounded import call_each, run_bounded


def behave(how):
    if how == "hang":
        time.sleep(600)
    elif how == "crash":
        os.abort()
    elif how == "allocate":
        return len(bytearray(200 << 20))
    elif how == "fail":
        raise ValueError("so")
    return how


def test_calls_are_bounded():
    called = call_each("faults.test_bounded:behave", ["fine", "hang", "allocate", "crash", "fail", "last"], 1, 500)
    errors = {how: call.error for how, call in called.items()}
    assert errors == {
        **dict.fromkeys(("fine", "allocate", "last")),
        **dict.fromkeys(("hang", "crash"), "killed"),
        "fail": "ValueError",
    }
    assert called["fine"].value == "fine" and called["fail"].value == "so" and called["last"].value == "last"
    assert called["allocate"].growth > 190 > called["fine"].growth


def test_processes_are_bounded():
    code = "import sys, time\nprint('x' * 10**6)\nbytearray(int(sys.argv[1]) << 30)\ntime.sleep(float(sys.argv[2]))"
    slow = run_bounded([sys.executable, "-c", code, "0", "600"], 1, 100)
    assert slow.returncode is None and slow.seconds < 60
    large = run_bounded([sys.executable, "-c", code, "8", "0"], 60, 100)
    assert large.returncode == 1 and "MemoryError" in large.stderr
    fine = run_bounded([sys.executable, "-c", code, "0", "0"], 60, 100)
    assert fine.returncode == 0 and len(fine.stdout) == 10**6 + 1
