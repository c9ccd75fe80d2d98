"""Set up .venv in this checkout, once, and start the demo or the tests in it.

Standard library only. `uv` is used where it runs, `venv` and pip otherwise. A torch that the starting interpreter
already has is reused. A stamp in .venv says what was installed; while it fits, a start costs a hash and an exec.

    tools/bootstrap.py try [ARGUMENTS OF eke compress]
    tools/bootstrap.py check [ARGUMENTS OF pytest]
    tools/bootstrap.py setup
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "eke-setup.json"
PYTHON = VENV / "bin" / "python"
REUSED = VENV / "eke-reused.txt"
INSTALLING = "installing"
OLDEST_TORCH = (2, 13)
PROBE = """
import json, torch, torchvision
print(json.dumps({"torch": torch.__version__, "torchvision": torchvision.__version__, "place": torch.__path__[0]}))
"""


def say(text: str) -> None:
    """Print a line at once, so that it stands before what follows."""
    print(text, flush=True)


def fingerprint() -> str:
    """Hash everything that decides what is installed: requirements, pins, build hook, interpreter."""
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", ROOT / "constraints.txt", ROOT / "setup.py", VENV / "pyvenv.cfg"):
        digest.update(path.read_bytes() if path.exists() else b"absent")
    return digest.hexdigest()


def read_stamp() -> dict[str, str]:
    """Return what the last set-up wrote: the checkout's path and a fingerprint, or nothing."""
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(state: str) -> None:
    """Write the stamp atomically."""
    part = STAMP.with_suffix(".part")
    part.write_text(json.dumps({"root": str(ROOT), "state": state}))
    os.replace(part, STAMP)


def ready() -> bool:
    """Whether .venv is complete and fits this checkout."""
    return PYTHON.exists() and read_stamp() == {"root": str(ROOT), "state": fingerprint()}


def must_be_rebuilt() -> bool:
    """Whether .venv cannot be updated in place: cut off in the middle, moved with its folder, or without interpreter.

    A .venv that somebody made by hand (no stamp, working interpreter) is kept and installed into.
    """
    if not PYTHON.exists() or not (VENV / "pyvenv.cfg").exists():
        return True
    stamp = read_stamp()
    return bool(stamp) and (stamp.get("state") == INSTALLING or stamp.get("root") != str(ROOT))


def output(command: list[str]) -> str | None:
    """Return what a command prints, or None where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def find_torch(python: str) -> dict[str, str] | None:
    """Versions and place of the torch and torchvision that an interpreter imports together, or None."""
    answer = output([python, "-c", PROBE])
    return json.loads(answer.splitlines()[-1]) if answer else None


def fits(found: dict[str, str] | None) -> bool:
    """Whether a found torch is new enough."""
    if found is None:
        return False
    numbers = found["torch"].split("+")[0].split(".")[:2]
    return tuple(int("".join(c for c in n if c.isdigit()) or 0) for n in numbers) >= OLDEST_TORCH


def describe(found: dict[str, str]) -> str:
    """Name a found torch by version and place."""
    return f"torch {found['torch']} and torchvision {found['torchvision']} from {Path(found['place']).parent}"


def run(command: list[str], *, advice: str) -> None:
    """Run a command of the set-up, or stop with what can be done."""
    if subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL).returncode:
        sys.exit(f"\nSet-up stopped: {' '.join(command)} failed (its output is above). {advice}")


def announce(reused: dict[str, str] | None) -> None:
    """Say what will be downloaded before it is."""
    if reused:
        say(f"Reusing {describe(reused)}.")
        say("To download: the other packages, about 150 MB (500 MB on disk).")
        return
    oldest = ".".join(map(str, OLDEST_TORCH))
    say(f"No torch >= {oldest} with torchvision to reuse in {sys.executable}. Downloaded is what no cache holds.")
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        say("To download: about 3 GB (5 GB on disk), nearly all of it torch with its CUDA libraries;")
        say("about 0.4 GB where your package index offers torch's CPU build instead.")
    else:
        say("To download: about 0.4 GB (1.5 GB on disk), most of it torch.")


def create(uv: str | None, *, system_packages: bool) -> None:
    """Create an empty .venv and mark it as unfinished."""
    if VENV.is_symlink() or VENV.is_file():
        VENV.unlink()
    elif VENV.exists():
        shutil.rmtree(VENV)
    base = getattr(sys, "_base_executable", sys.executable)
    site = ["--system-site-packages"] if system_packages else []
    if uv:
        run([uv, "venv", "--quiet", "--python", base, *site, str(VENV)], advice="Is uv up to date?")
    else:
        advice = "On Debian and Ubuntu: apt-get install python3-venv. Or install uv."
        run([base, "-m", "venv", *site, str(VENV)], advice=advice)
    if system_packages:
        REUSED.write_text('torch ; python_version < "0"\ntorchvision ; python_version < "0"\n')
    write_stamp(INSTALLING)


def install(uv: str | None) -> None:
    """Install the checkout, editable, with its development tools.

    pip sees the packages of the interpreter below, uv does not: an override tells it not to install a reused torch.
    """
    free = shutil.disk_usage(ROOT).free / 1e9
    advice = f"Check the network and the disk ({free:.0f} GB free), then start again: it goes on."
    what = ["-c", "constraints.txt", "-e", ".[dev,vision]"]
    if uv:
        override = ["--override", str(REUSED)] if REUSED.exists() else []
        run([uv, "pip", "install", "--python", str(PYTHON), *override, *what], advice=advice)
    else:
        run([str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", *what], advice=advice)


def set_up() -> None:
    """Bring .venv to the state that the requirements ask for."""
    start = time.monotonic()
    candidate = shutil.which("uv")
    uv = candidate if candidate and output([candidate, "--version"]) else None
    say(f"Setting up {VENV} with {'uv' if uv else 'venv and pip'} and Python {platform.python_version()}.")
    if must_be_rebuilt():
        reused = find_torch(getattr(sys, "_base_executable", sys.executable))
        reused = reused if fits(reused) else None
        announce(reused)
        create(uv, system_packages=reused is not None)
        if reused and not fits(find_torch(str(PYTHON))):
            say("That torch cannot be seen from a virtual environment.")
            announce(None)
            create(uv, system_packages=False)
    else:
        say("Updating it: the requirements changed, or somebody else made it. Missing packages are downloaded.")
        if STAMP.exists():
            write_stamp(INSTALLING)
        if not uv and output([str(PYTHON), "-m", "pip", "--version"]) is None:
            run([str(PYTHON), "-m", "ensurepip"], advice="Delete .venv and start again.")
    install(uv)
    found = find_torch(str(PYTHON))
    if found is None or not fits(found):
        sys.exit(
            f"Set-up stopped: .venv has no fitting torch with torchvision ({found}). Delete .venv and start again."
        )
    write_stamp(fingerprint())
    say(f"Installed {describe(found)}.")
    say(f"Set-up took {time.monotonic() - start:.0f} s.\n")


def set_up_alone() -> None:
    """Set up unless .venv is ready; a second start in the same checkout waits for the first."""
    if ready():
        return
    try:
        import fcntl
    except ImportError:
        set_up()
        return
    with (ROOT / "pyproject.toml").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready():
            set_up()


def demo(arguments: list[str]) -> int:
    """Run the demo; a verified run that missed its budget is a finished run."""
    output_folder = [] if any(a == "--out" or a.startswith("--out=") for a in arguments) else ["--out", "eke-demo"]
    command = [str(VENV / "bin" / "eke"), "compress", "--task", "demo", *output_folder, *arguments]
    code = wait_for(command)
    if code == 130:
        again = [*(a for a in arguments if a != "--resume"), "--resume"]
        say(f"Continue with: ./try {shlex.join(again)}")
    return 0 if code in (0, 3) else code


def wait_for(command: list[str]) -> int:
    """Run a command to its end and return its exit code.

    Ctrl-C reaches it too: it is left the time to say how to go on, where `subprocess.run` would kill it.
    """
    process = subprocess.Popen(command)
    while True:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            continue
        return 130 if code == -signal.SIGINT else code


def tests(arguments: list[str]) -> int:
    """Replace this process by pytest, one thread for each of its two workers."""
    os.chdir(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    command = [str(PYTHON), "-m", "pytest", "-n", "2", "-m", "not slow", *arguments]
    sys.stdout.flush()
    os.execv(command[0], command)


def main(arguments: list[str]) -> int:
    """Dispatch one verb."""
    verbs = {"try": demo, "check": tests, "setup": lambda _: 0}
    if not arguments or arguments[0] not in verbs:
        say(__doc__ or "")
        return 2
    set_up_alone()
    return verbs[arguments[0]](arguments[1:])


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. Start again to go on.")
