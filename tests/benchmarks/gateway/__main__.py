"""``python -m tests.benchmarks.gateway [--only PART …] [--pairs N]``: the gateway against its floors and its peers.

It runs in a copy of the code that has one page more (``page``), beside which ``var/benchmarks`` keeps its place.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from cluster import session
from cluster.settings import Settings
from tests.benchmarks.gateway import PAIRS, PARTS, USE_CASE
from tests.benchmarks.harness import ENVIRONMENTS

CODE = ("cluster", "pipelines", "serving", "tests")


def main() -> int:
    """The exit code of the measurement."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gateway", description=__doc__)
    parser.add_argument("--only", action="append", choices=tuple(PARTS), help="a part; may be repeated; all by default")
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"interleaved rounds of each comparison ({PAIRS})")
    options = parser.parse_args()
    if options.pairs < 1:
        parser.error("--pairs takes 1 or more")
    with tempfile.TemporaryDirectory() as place:
        code, settings = Path(place) / "code", Settings(home=Path(place) / "home", http_port=session.free_port())
        _copy(code)
        # What a cluster of this shell is set to is no part of the benchmark.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TIDEGATE_"))}
        command = [sys.executable, "-m", "tests.benchmarks.gateway.measure", str(options.pairs), *(options.only or ())]
        kept |= settings.environment() | session.driver_environment(settings)
        # The cluster's own cache of compiled code, so that nothing is compiled twice.
        kept |= {"PYTHONPATH": str(code), "NUMBA_CACHE_DIR": str(settings.cache_dir / "numba")}
        measuring = subprocess.Popen(command, cwd=code, env=kept)
        # It ends its cluster when it is interrupted or asked to end, and that is waited for.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: measuring.terminate())
        status = measuring.wait()
        session.down(settings)  # what is left when it was killed
        return status


def _copy(place: Path) -> None:
    here = Path(__file__).resolve()
    root = here.parents[3]
    for name in CODE:
        shutil.copytree(root / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(here.with_name("page.py"), place / "pipelines" / "usecases" / f"{USE_CASE}.py")
    environments = ENVIRONMENTS.absolute()
    environments.mkdir(parents=True, exist_ok=True)
    (place / ENVIRONMENTS).parent.mkdir()
    (place / ENVIRONMENTS).symlink_to(environments)


if __name__ == "__main__":
    raise SystemExit(main())
