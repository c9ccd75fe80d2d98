"""Kill -9 at random moments: whatever is continued ends with the bytes of a run that nobody disturbed."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from eke.compression.artifact import PLAN, WEIGHTS
from eke.cost import write_tensors

KILLS = 20

# A nursery imports everything once and forks a child for every run, so that kills fall into the run and not into the
# imports. It reads "run folder, artifact folder, seconds until the kill (0 for never)" and answers with the exit code.
NURSERY = """
    import itertools, os, signal, sys, time
    import torch, torch._dynamo
    torch.set_num_threads(1)
    from compression.conftest import shorten_measurements
    from compression.nets import STEPS, Tiny, tiny_task
    from eke import Budget, compress
    from eke.compression import Recovery, recover
    from eke.compression.checkpoint import Run
    from eke.cost import read_tensors
    from eke.structures import Both, LowRank, UniformGrid, Unstructured

    shorten_measurements()
    model = Tiny().eval()
    model.load_state_dict(read_tensors(sys.argv[1])[0])

    def child(folder, artifact):
        ticks = itertools.count()
        recover.time.monotonic = lambda: 11 * next(ticks)
        result = compress(
            model, tiny_task(), budget=Budget(size="0.25x", macs="0.5x"), recovery=Recovery(steps=30, batch_size=32),
            folder=folder, resume=True,
            structures=(UniformGrid(4), Both(Unstructured(0.5), UniformGrid(4)), LowRank(0.5, UniformGrid(6))),
        )
        result.save(artifact)
        Run(folder, {}, resume=False).finish()

    for line in sys.stdin:
        folder, artifact, seconds = line.split()
        start = time.time()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                import pathlib
                child(pathlib.Path(folder), pathlib.Path(artifact))
                code = 0
            finally:
                os._exit(code)
        if float(seconds):
            time.sleep(float(seconds))
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(code, time.time() - start, flush=True)
"""


class Nursery:
    """The process that forks runs."""

    def __init__(self, weights: Path, log: Path) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(NURSERY), str(weights)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True,
            cwd=Path(__file__).parents[1],
        )  # fmt: skip

    def run(self, folder: Path, artifact: Path, *, kill_after: float = 0.0) -> tuple[bool, float]:
        """Whether the run ended by itself, and how long it took."""
        self.process.stdin.write(f"{folder} {artifact} {kill_after}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().split()
        assert answer, self.log.read_text()
        assert answer[0] in ("0", "-9"), self.log.read_text()
        return answer[0] == "0", float(answer[1])


@pytest.fixture
def nursery(taught, tmp_path):
    write_tensors(tmp_path / "taught", taught.state_dict(), {})
    nursery = Nursery(tmp_path / "taught", tmp_path / "log")
    yield nursery
    nursery.process.stdin.close()
    nursery.process.wait(timeout=60)


@pytest.mark.slow
def test_killed_runs_end_with_the_bytes_of_an_uninterrupted_one(nursery, tmp_path):
    nursery.run(tmp_path / "warm", tmp_path / "warm-artifact")
    ended, seconds = nursery.run(tmp_path / "whole", tmp_path / "whole-artifact")
    assert ended
    wanted = (tmp_path / "whole-artifact" / WEIGHTS).read_bytes()
    chance, kills, number, deadline = random.Random(0), 0, 0, time.monotonic() + 200
    stages_met: set[str] = set()
    while kills < KILLS and time.monotonic() < deadline:
        folder, artifact = tmp_path / f"run{number}", tmp_path / f"artifact{number}"
        number += 1
        ended = False
        while not ended:
            # A continued run is shorter than a whole one: its kills fall on all moments all the same.
            moment = chance.uniform(0.01, 1.0) * seconds if kills < KILLS else 0.0
            ended, _ = nursery.run(folder, artifact, kill_after=moment)
            kills += not ended
            stages_met |= {path.name for path in folder.iterdir()} if folder.exists() else set()
        assert (artifact / WEIGHTS).read_bytes() == wanted, f"run {number} after {kills} kills"
        names = sorted(path.name for path in artifact.iterdir())
        assert names == [WEIGHTS, PLAN, "recipe.yaml", "report.html", "report.json"]
        assert not folder.exists()
    assert kills == KILLS
    # The kills met runs at several stages.
    assert len({name for name in stages_met if not name.startswith(".")}) >= 4
