"""What does eke make of models it has never seen? Two questions, each asked of every model in a process of its own.

inspect: does `eke inspect` run, what does it find, and do its FLOPs agree with three other counters, cause by cause?
compress: does `eke.compress` end in a verified result or a refusal that names the module, and is every channel group,
cut on the real weights in float64, equal to the model whose channels are masked?

    python benchmarks/zoo.py inspect [--only PATTERN] [--smoke] [--write benchmarks/results/zoo_inspect.json]
    python benchmarks/zoo.py compress [--only PATTERN] [--smoke] [--write benchmarks/results/zoo_compress.json]

Every model's row goes to the work file as soon as it is there; a run that was killed goes on where it stopped. A model
that takes too long or too much memory is a row with that error.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import fnmatch
import json
import math
import multiprocessing
import operator
import os
import re
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import zoo_models
from torch import nn

from eke import __version__
from eke.cost import environment

WORK = Path("build")
PATIENCE = 20
"""Seconds by the clock that one second of the processor may take on a busy machine."""


class Stages:
    """Where a row is being made: seconds of the processor for each stage, and the last one when it ends badly."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.current = "start"
        self.began = time.process_time()

    def begin(self, name: str) -> None:
        """End the stage before and start another."""
        self.end()
        self.current, self.began = name, time.process_time()

    def end(self) -> None:
        """Note the seconds of the current stage."""
        if self.current != "start":
            self.seconds[self.current] = round(time.process_time() - self.began, 2)


def inspect_row(name: str, stages: Stages, model_of: dict[str, nn.Module]) -> dict[str, Any]:
    """Return what `eke inspect` says of a model, and what other counters say of its FLOPs.

    Args:
        name: See `zoo_models.names`.
        stages: Told what is being done.
        model_of: Gets the model under "model", so that an error can be traced to a module.

    Returns:
        Plain values.
    """
    import zoo_flops

    from eke.cli.inspect import inspected

    stages.begin("build")
    model, inputs = zoo_models.build(name)
    model_of["model"] = model
    row: dict[str, Any] = {
        "input": list(inputs[0].shape),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    stages.begin("inspect")
    with kept_whole() as whole:
        document, groups, skipped = inspected(model, None, inputs=inputs, title=name, seconds=0.02)
    row |= {
        "flops": document.before.flops if document.before else None,
        "milliseconds": document.before.milliseconds if document.before else None,
        "sites": len(document.sites),
        "skipped": skipped,
        "groups": len(groups),
        "channels": sum(group["size"] for group in groups),
        "in_groups": len({member["module"] for group in groups for member in group["members"]}),
        "whole": whole,
    }
    stages.begin("counters")
    row["counters"] = zoo_flops.compared(model, inputs)
    assert row["counters"]["eke"] == row["flops"], (row["counters"]["eke"], row["flops"])
    stages.end()
    return row


@contextlib.contextmanager
def kept_whole() -> Any:
    """Yield the list that gets every layer whose channels stay whole, with the reason; the warning names twelve."""
    from eke.sites import groups

    found: list[list[str]] = []
    warn = groups._warn

    def noted(failures: Any) -> None:
        found.extend([failure[0], failure[2]] for failure in failures)
        warn(failures)

    groups._warn = noted
    try:
        yield found
    finally:
        groups._warn = warn


def module_of(model: nn.Module | None, error: BaseException) -> str:
    """Return the name of the innermost module whose forward pass an error went through."""
    names = {} if model is None else {type(m): n for n, m in model.named_modules()}
    exact = {} if model is None else {id(m): n for n, m in model.named_modules()}
    found, frames = "", error.__traceback__
    while frames is not None:
        owner = frames.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            found = exact.get(id(owner)) or names.get(type(owner)) or found
        frames = frames.tb_next
    return found


def _child(
    job: Callable[..., dict[str, Any]], name: str, *, seconds: float, memory: int, trace: str, pipe: Connection
) -> None:
    """Make one row in a process of its own and send it."""
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 5))
    torch.set_num_threads(1)
    said = open(trace, "w")  # noqa: SIM115
    faulthandler.register(signal.SIGXCPU, file=said, all_threads=False, chain=True)
    faulthandler.register(signal.SIGUSR1, file=said, all_threads=False)
    stages, model_of = Stages(), dict[str, nn.Module]()
    began = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = job(name, stages, model_of)
        row = {"name": name, "ok": True, **row}
    except BaseException as error:
        lines = traceback.format_exception(error)
        row = {
            "name": name, "ok": False, "stage": stages.current, "module": module_of(model_of.get("model"), error),
            "error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}", "where": "".join(lines)[-1500:],
        }  # fmt: skip
    row["seconds"] = {"all": round(time.process_time() - began, 2), **stages.seconds}
    row["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.send(row)
    pipe.close()
    os._exit(0)


def isolated(job: Callable[..., dict[str, Any]], name: str, *, seconds: float, memory: int) -> dict[str, Any]:
    """Make one row in a child process.

    Args:
        job: Makes the row.
        name: Of the model.
        seconds: Of the processor; then the child is stopped, and after `PATIENCE` times as long by the clock.
        memory: Bytes that it may take.

    Returns:
        The row; an error where the child was stopped or died.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r", suffix=".txt") as trace:
        limits = {"seconds": seconds, "memory": memory, "trace": trace.name, "pipe": sender}
        child = context.Process(target=_child, args=(job, name), kwargs=limits)
        child.start()
        sender.close()
        row = {"name": name, "ok": False, "stage": "", "module": "", "seconds": {"all": seconds}}
        try:
            if receiver.poll(PATIENCE * seconds):
                return dict(receiver.recv())
            assert child.pid is not None
            os.kill(child.pid, signal.SIGUSR1)
            time.sleep(1)
            row |= {"error": f"stopped after {PATIENCE * seconds:.0f} s", "where": trace.read()[-3000:]}
        except EOFError:
            child.join()
            slow = child.exitcode == -signal.SIGXCPU
            said = f"stopped after {seconds:.0f} s of the processor" if slow else f"died (exit code {child.exitcode})"
            row |= {"error": f"the process {said}", "where": trace.read()[-3000:]}
        finally:
            child.kill()
            child.join()
        return row


def run(
    job: Callable[..., dict[str, Any]], chosen: list[str], work: Path, *, seconds: float, memory: int, again: bool
) -> list[dict[str, Any]]:
    """Make the rows that the work file lacks.

    Args:
        job: Makes one.
        chosen: Names.
        work: JSON lines.
        seconds: Of one row.
        memory: Bytes of one row.
        again: Whether rows that failed are made once more.

    Returns:
        A row for every name.
    """
    work.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in work.read_text().splitlines()] if work.exists() else []
    known = {row["name"]: row for row in rows if row["ok"] or not again}
    with work.open("a") as file:
        for number, name in enumerate(chosen, start=1):
            if name not in known:
                known[name] = isolated(job, name, seconds=seconds, memory=memory)
                file.write(json.dumps(known[name]) + "\n")
                file.flush()
            row = known[name]
            said = "ok" if row["ok"] else f"{row.get('stage')} {row.get('module')}: {row['error'][:120]}"
            print(f"{number}/{len(chosen)} {name}: {row['seconds']['all']:.1f} s {said}", flush=True)
    return [known[name] for name in chosen]


def compact(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with reasons counted instead of listed: module names and numbers in them become "..."."""
    kept = {key: value for key, value in row.items() if key not in ("where", "skipped", "whole")}
    kept["family"] = zoo_models.family(row["name"])
    if "skipped" in row:
        kept["skipped"] = dict(Counter(row["skipped"].values()).most_common())
    if "whole" in row:
        kept["whole"] = dict(Counter(plain_reason(reason) for _, reason in row["whole"]).most_common())
    return kept


def plain_reason(reason: str) -> str:
    """Return why channels stay whole, without the names and numbers of one model."""
    reason = re.sub(r" by [-+.e\d]+ relative", "", reason)
    reason = re.sub(r"^[\w.]+\.[\w.]+: |^[\w]+: (?!the cut)", "", reason)
    reason = re.sub(r"[\w]+(\.[\w]+)+", "...", reason)
    reason = re.sub(r"(\(\w+Error: [^'\[\d-]*)['\[\d-].*", r"\1...)", reason)
    return re.sub(r"(?<![A-Za-z])-?\d+", "#", reason)


def main() -> None:
    """Read the arguments, make the rows, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("inspect", "compress"))
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names such as 'timm:*vit*'")
    parser.add_argument("--smoke", action="store_true", help="a few that take seconds")
    parser.add_argument("--nightly", action="store_true", help="a dozen")
    parser.add_argument("--work", type=Path, help="JSON lines of finished rows; default build/zoo_PART.jsonl")
    parser.add_argument("--write", type=Path, help="the result, such as benchmarks/results/zoo_inspect.json")
    parser.add_argument("--again", action="store_true", help="make rows that failed once more")
    parser.add_argument("--seconds", type=float, default=900, help="of the processor, limit of one model")
    parser.add_argument("--gigabytes", type=float, default=12, help="limit of one model")
    chosen = parser.parse_args()
    good: Callable[[dict[str, Any]], bool] = operator.itemgetter("ok")
    torch.set_num_threads(1)
    import timm  # noqa: F401  Children start with what the parent has imported.
    import torch_pruning  # noqa: F401
    import torchvision  # noqa: F401

    if chosen.part == "compress":
        import zoo_compress

        job, every, smoke, nightly = zoo_compress.row, zoo_compress.names(), zoo_compress.SMOKE, zoo_compress.NIGHTLY
        good = zoo_compress.good
    else:
        job, every, smoke, nightly = inspect_row, zoo_models.names(), zoo_models.SMOKE, zoo_models.NIGHTLY
    names = list(smoke if chosen.smoke else nightly if chosen.nightly else every)
    names = [name for name in names if fnmatch.fnmatch(name, chosen.only)]
    work = chosen.work or WORK / f"zoo_{chosen.part}.jsonl"
    rows = run(job, names, work, seconds=chosen.seconds, memory=int(chosen.gigabytes * 2**30), again=chosen.again)
    bad = [row["name"] for row in rows if not good(row)]
    print(f"{len(rows) - len(bad)} of {len(rows)} are as they should be{': not ' if bad else ''}{', '.join(bad)}")
    if chosen.write:
        whole = {row["name"] for row in rows} >= set(every)
        head = {"eke": __version__, "environment": environment().to_json(), "part": chosen.part, "whole": whole}
        lines = ",\n".join(json.dumps(compact(row)) for row in rows)
        text = f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n]}}\n'
        chosen.write.write_text(text, encoding="utf-8")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
