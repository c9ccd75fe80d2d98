"""How errors are told: whose they are decides how much is shown."""

from __future__ import annotations

import json
import warnings

import pytest
import typer

from eke._errors import MissingExtraError
from eke.cli.session import Interrupted, UsageError, exit_code, session
from eke.compression import InfeasibleError


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ValueError("two\n  lines"), 1, "error: two lines"),
        (TypeError("wrong"), 1, "error: wrong"),
        (InfeasibleError("too small", {}), 1, "error: too small"),
        (MissingExtraError("install it"), 1, "error: install it"),
        (OSError(28, "No space left on device", "model.safetensors"), 1, "error: model.safetensors: No space left"),
        (OSError("could not be written"), 1, "error: could not be written"),
        (FloatingPointError("the loss is nan in step 3"), 1, "error: the loss is nan in step 3"),
        (UsageError("what?"), 2, "error: what?"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Interrupted("interrupted; continue with: x"), 130, "interrupted; continue with: x"),
    ],
)
def test_an_error_is_one_paragraph_and_a_code(error, code, told, capsys):
    with pytest.raises(typer.Exit) as done, session(as_json=False, debug=False):
        raise error
    assert done.value.exit_code == exit_code(error) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(told)
    assert shown.err.count("\n") == 1


def test_debug_lets_the_error_through():
    with pytest.raises(ValueError, match="raw"), session(as_json=False, debug=True):
        raise ValueError("raw")


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), session(as_json=False, debug=False):
        _ = 1 / 0


def test_an_exit_passes_through():
    with pytest.raises(typer.Exit) as done, session(as_json=True, debug=False):
        raise typer.Exit(3)
    assert done.value.exit_code == 3


def test_with_json_an_error_is_a_document_and_prints_go_to_stderr(capsys):
    def work():
        typer.echo("chatter")
        raise ValueError("no")

    with pytest.raises(typer.Exit), session(as_json=True, debug=False):
        work()
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"error": "no", "exit_code": 1}
    assert shown.err == "chatter\nerror: no\n"


def test_a_warning_is_one_line(capsys):
    with session(as_json=False, debug=False):
        warnings.warn("some\nwords", stacklevel=1)
    assert capsys.readouterr().err == "warning: some words\n"


def test_an_exception_of_the_users_file_shows_its_traceback_from_there_on(eke, files):
    told = eke("inspect", "cli_tiny_model.py:raises", "--input", "1,3", code=1).stderr
    assert told.startswith("error in cli_tiny_model.py:")
    frames = [line for line in told.splitlines() if line.startswith("  File ")]
    assert f'File "{files}/cli_tiny_model.py", line' in frames[0]
    assert "src/eke" not in told
    assert "TypeError" in told


def test_a_syntax_error_names_the_line(eke, tmp_path):
    (tmp_path / "cli_syntax.py").write_text("x = 1\ndef build(:\n")
    told = eke("inspect", f"{tmp_path}/cli_syntax.py:build", "--input", "1,3", code=1).stderr
    assert 'cli_syntax.py", line 2' in told
    assert "Traceback" not in told


def test_the_traceback_of_the_users_file_ends_at_its_own_last_line(eke, files):
    done = eke("compress", "cli_tiny_model.py:raises", "--data", "cli_tiny_data.py:task", "--size", "0.5x", code=1)
    assert 'return nn.Linear(3, "two")' in done.stderr
    assert "site-packages" not in done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith("TypeError: ")


def test_a_budget_that_no_measured_plan_kept_is_not_met_and_an_impossible_one_is_an_error():
    from eke.compression.plan import InfeasibleError

    assert exit_code(InfeasibleError("no plan kept it", {}, proved=False)) == 3
    assert exit_code(InfeasibleError("below the smallest plan", {})) == 1
