"""Python programs in forks of a process that has imported torch: most of their time otherwise."""

from __future__ import annotations

import multiprocessing
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["setuptools", "torch", "pytest"])


def run(
    program: str, folder: Path, cwd: Path = ROOT, **env: str
) -> subprocess.CompletedProcess[str]:
    """What it says goes through the folder."""
    files = [str(folder / name) for name in ("stdout", "stderr")]
    before = (
        f"import os; os.environ.update({env!r}); os.chdir({str(cwd)!r})\n"
        f"for k, file in enumerate({files!r}):\n"
        "    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), k + 1)\n"
    )
    process = FORKS.Process(target=exec, args=(before + program, {"__name__": "__main__"}))
    process.start()
    process.join()
    texts = [Path(file).read_text() for file in files]
    code = process.exitcode
    assert code is not None  # it has been joined
    return subprocess.CompletedProcess(program, code, *texts)


def run_pytest(arguments: Sequence[str], folder: Path, **env: str) -> None:
    """On files beside this one; all must pass."""
    program = f"import sys, pytest\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
    words = ["-q", "-p", "no:cacheprovider", *arguments]
    done = run(f"{program}sys.exit(pytest.main({words!r}))", folder, ROOT, **env)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
