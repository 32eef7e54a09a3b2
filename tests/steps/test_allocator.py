from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from qtool.steps.allocator import freed_memory_kept

# Blocks beyond 32 MiB, which glibc always gives back, on their own.
SCRIPT = """
import ctypes, resource
from qtool.steps.allocator import freed_memory_kept

def fresh_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        ctypes.create_string_buffer(2 ** 26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

found = [fresh_pages()]
with freed_memory_kept():
    fresh_pages()
    found.append(fresh_pages())
    held = resident()
found += [fresh_pages(), held - resident()]
print(*found)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
def test_what_is_freed_needs_no_fresh_pages_until_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before, kept, after, given_back = map(int, done.stdout.split())
    assert before > 100
    assert kept < before / 4
    assert after > before / 2
    assert given_back > 8000


def test_elsewhere_nothing_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("a library was opened"))
    with freed_memory_kept():
        pass
