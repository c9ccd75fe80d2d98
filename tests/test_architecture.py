"""The house numbers: what keeps the package readable, measured on its syntax trees."""

from __future__ import annotations

import ast
import importlib.util
import re
import statistics
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "eke"
Function = ast.FunctionDef | ast.AsyncFunctionDef
EXTRAS = {
    "torchvision", "timm", "transformers", "datasets", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf",
    "torchao", "optuna", "flwr", "zeus", "mkdocs", "pytest", "hypothesis", "fvcore", "matplotlib", "sklearn", "pandas",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One file: its dotted name inside eke, its text and its syntax tree."""

    path: Path
    name: str
    text: str
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def is_kernel(self) -> bool:
        return self.name.startswith("ops.")


def read(path: Path) -> Source:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    text = path.read_text(encoding="utf-8")
    return Source(path, name, text, ast.parse(text, str(path)))


SOURCES = [read(path) for path in sorted(PACKAGE.rglob("*.py"))]


def where(source: Source, node: ast.AST) -> str:
    return f"{source.path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def nodes(kind: type | tuple[type, ...]) -> Iterator[tuple[Source, ast.AST]]:
    for source in SOURCES:
        for node in ast.walk(source.tree):
            if isinstance(node, kind):
                yield source, node


def is_kernel(node: ast.ClassDef | Function) -> bool:
    """Whether a function is compiled by Triton: it takes pointers, sizes and strides one by one, and no types."""
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)


def functions() -> Iterator[tuple[Source, Function]]:
    found = nodes((ast.FunctionDef, ast.AsyncFunctionDef))
    yield from ((source, node) for source, node in found if not is_kernel(node))


def public(source: Source) -> Iterator[ast.ClassDef | Function]:
    """Public functions and classes of a module, and the public methods of its public classes."""
    for node in source.tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            if is_kernel(node):
                continue
            yield node
            if isinstance(node, ast.ClassDef):
                members = (m for m in node.body if isinstance(m, (ast.FunctionDef, ast.AsyncFunctionDef)))
                yield from (m for m in members if not m.name.startswith("_"))


def arguments(node: Function) -> list[ast.arg]:
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    return [a for a in every if a is not None and a.arg not in ("self", "cls")]


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def lines_of(text: str) -> int:
    return text.count("\n") + 1


def percentile(values: list[int], share: float) -> int:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# Sizes


def test_files_are_short():
    sizes = {str(s.path.relative_to(ROOT)): lines_of(s.text) for s in SOURCES}
    assert {name: size for name, size in sizes.items() if size > 500} == {}
    assert statistics.median(sizes.values()) <= 170


def test_functions_are_short():
    spans = {f"{where(s, f)} {f.name}": (f.end_lineno or f.lineno) - f.lineno + 1 for s, f in functions()}
    assert {name: span for name, span in spans.items() if span > 100} == {}
    assert percentile(list(spans.values()), 0.9) <= 45


def test_functions_take_at_most_seven_arguments():
    def count(node: Function) -> int:
        defaults = sum(default is not None for default in node.args.kw_defaults)
        return len(arguments(node)) - defaults

    assert {f"{where(s, f)} {f.name}": count(f) for s, f in functions() if count(f) > 7} == {}


def windows(text: str) -> tuple[int, Iterator[tuple[int, tuple[str, ...]]]]:
    """Number of code lines, and every run of eight of them with its place."""
    bare = re.sub(r'("""|\'\'\')(?:.|\n)*?\1', "", text)
    stripped = (re.sub(r"\s+", " ", re.sub(r"#.*", "", line).strip()) for line in bare.split("\n"))
    code = [line for line in stripped if len(line) > 3 and not line.startswith(("import ", "from "))]
    return len(code), ((i, tuple(code[i : i + 8])) for i in range(len(code) - 7))


@pytest.mark.parametrize(("kernels", "limit"), [(False, 0.05), (True, 0.15)], ids=["package", "kernels"])
def test_code_is_not_repeated(kernels, limit):
    places, total = defaultdict(list), 0
    for source in SOURCES:
        if source.is_kernel == kernels:
            length, runs = windows(source.text)
            total += length
            for index, run in runs:
                places[run].append((str(source.path.relative_to(ROOT)), index))
    repeated = {
        (path, line)
        for found in places.values()
        if len(found) > 1
        for path, index in found
        for line in range(index, index + 8)
    }
    assert len(repeated) <= limit * total, (
        f"{len(repeated)} of {total} lines repeat, in {sorted({p for p, _ in repeated})}"
    )


def test_tests_are_as_long_as_they_should_be():
    tests = sum(lines_of(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("*.py"))
    assert tests >= 0.7 * sum(lines_of(s.text) for s in SOURCES)


# Words


def test_public_names_are_documented():
    missing = [f"{where(s, n)} {n.name}" for s in SOURCES for n in public(s) if not ast.get_docstring(n)]
    missing += [where(s, s.tree) for s in SOURCES if s.tree.body and not ast.get_docstring(s.tree)]
    assert missing == []


def test_functions_are_annotated():
    def bare(node: Function) -> bool:
        return node.returns is None or any(a.annotation is None for a in arguments(node))

    assert [f"{where(s, f)} {f.name}" for s, f in functions() if bare(f)] == []


def test_public_signatures_have_no_keyword_dictionary():
    public_functions = ((s, n) for s in SOURCES for n in public(s) if not isinstance(n, ast.ClassDef))
    assert [where(s, f) for s, f in public_functions if f.args.kwarg is not None] == []


def test_errors_print_the_offending_value():
    raised, silent = 0, []
    for source, node in nodes(ast.Raise):
        if isinstance(node.exc, ast.Call) and called(node.exc).rpartition(".")[2].lstrip("_")[0].isupper():
            raised += 1
            first = node.exc.args[0] if node.exc.args else None
            formats = isinstance(first, ast.JoinedStr) or (first is not None and re.search(r"[{%]", ast.unparse(first)))
            if not formats:
                silent.append(where(source, node))
    assert len(silent) <= 0.05 * raised, silent


def test_no_smells_in_names():
    drawers = {"utils", "util", "helpers", "helper", "common", "misc", "base"}
    assert [s.name for s in SOURCES if drawers & set(s.name.split("."))] == []
    classes = [(s, n.name) for s, n in nodes(ast.ClassDef)]
    smells = [f"{s.name}.{name}" for s, name in classes if re.match(r"Base[A-Z]|Abstract[A-Z]", name)]
    smells += [f"{s.name}.{name}" for s, name in classes if re.search(r"(Manager|Registry|Trainer)$", name)]
    assert smells == []


def test_no_unanchored_notes():
    pattern = re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b")
    assert [s.name for s in SOURCES if pattern.search(s.text)] == []


# Imports and effects


def test_nothing_prints():
    assert [where(s, n) for s, n in nodes(ast.Call) if called(n) == "print"] == []


def test_no_environment_reads():
    names = {"environ", "environb", "getenv", "putenv"}
    hits = [where(s, n) for s, n in nodes(ast.Attribute) if n.attr in names and ast.unparse(n.value) == "os"]
    hits += [
        where(s, n) for s, n in nodes(ast.ImportFrom) if n.module == "os" and names & {alias.name for alias in n.names}
    ]
    assert hits == []


def imported(node: ast.AST) -> list[str]:
    """Absolute modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []


def test_package_imports_itself_relatively():
    hits = [
        where(s, n) for s, n in nodes((ast.Import, ast.ImportFrom)) if "eke" in {m.split(".")[0] for m in imported(n)}
    ]
    assert hits == []


def test_only_the_lazy_names_use_import_module():
    hits = [where(s, n) for s, n in nodes(ast.Call) if called(n).endswith("import_module") and s.name]
    assert hits == []


def top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run at import: no function bodies, nothing for type checkers only."""
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        yield statement
        for field in ("body", "orelse", "finalbody"):
            yield from top_level(getattr(statement, field, []))


def test_no_extra_is_imported_at_top_level():
    hits = [
        where(s, n)
        for s in SOURCES
        for n in top_level(s.tree.body)
        if EXTRAS & {module.split(".")[0] for module in imported(n)}
    ]
    assert hits == []


def targets(source: Source, node: ast.ImportFrom, names: set[str]) -> Iterator[str]:
    """Modules of eke that a relative import loads."""
    parts = source.name.split(".") if source.name else []
    stem = parts[: len(parts) - (node.level - 1 if source.is_package else node.level)]
    stem += node.module.split(".") if node.module else []
    for alias in node.names:
        dotted = ".".join([*stem, alias.name])
        while dotted and dotted not in names:
            dotted = dotted.rpartition(".")[0]
        if dotted and dotted != source.name:
            yield dotted


def test_imports_have_no_cycle():
    names = {s.name for s in SOURCES}
    graph = {
        s.name: {
            t for n in top_level(s.tree.body) if isinstance(n, ast.ImportFrom) and n.level for t in targets(s, n, names)
        }
        for s in SOURCES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


# Start


def loaded_after(code: str, *, block: set[str] = frozenset()) -> set[str]:
    """Names of the top-level packages that a fresh interpreter has loaded after running `code`."""
    script = (
        "import sys\n"
        f"for name in {sorted(block)!r}: sys.modules[name] = None\n"
        f"{code}\n"
        "sys.stderr.write('LOADED ' + ' '.join({m.split('.')[0] for m, v in sys.modules.items() if v is not None}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(done.stderr.rpartition("LOADED ")[2].split())


def test_import_eke_loads_neither_torch_nor_an_extra():
    loaded = loaded_after("import eke")
    assert "eke" in loaded
    assert loaded & (EXTRAS | {"torch", "numpy", "scipy", "rich", "typer"}) == set()


def test_help_leaves_torch_unimported():
    code = """
sys.argv = ['eke', '--help']
from eke.cli.main import main
try: code = main()
except SystemExit as done: code = done.code
assert not code, code
"""
    loaded = loaded_after(code)
    assert "eke" in loaded
    assert loaded & (EXTRAS | {"torch", "scipy"}) == set()


def test_every_module_imports_without_extras():
    modules = sorted(f"eke.{s.name}".rstrip(".") for s in SOURCES if not s.name.endswith("__main__"))
    code = f"import importlib\nfor name in {modules!r}: importlib.import_module(name)"
    loaded = loaded_after(code, block=EXTRAS)
    assert "torch" in loaded


# The repository


def test_dev_extra_and_dev_group_are_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["dependency-groups"]["dev"] == project["project"]["optional-dependencies"]["dev"]


def test_every_data_file_is_packaged():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["eke"]
    skipped = {".py", ".pyc", ".c", ".cpp", ".h", ".so"}
    files = [p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in skipped]
    packaged = {p for pattern in patterns for p in PACKAGE.glob(pattern)}
    assert [str(p.relative_to(ROOT)) for p in files if p not in packaged] == []


def test_floors_declare_every_room():
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    declared = set(re.findall(r"[a-z_]+", " ".join(contract["layers"])))
    present = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert present - declared - {"__init__", "__main__", "_version"} == set()
    optional = set(re.findall(r"\(([a-z_]+)\)", " ".join(contract["layers"])))
    assert optional & present == set(), "these rooms exist: take their parentheses away"


@pytest.mark.skipif(importlib.util.find_spec("importlinter") is None, reason="import-linter comes with the dev extra")
def test_imports_go_down_the_floors():
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_test_files_outside_of_packages_have_names_of_their_own():
    """pytest imports such files by their bare name: the second one of a name is not collected."""
    places = defaultdict(list)
    for path in (ROOT / "tests").rglob("test_*.py"):
        if not (path.parent / "__init__.py").exists():
            places[path.name].append(path.parent.name)
    assert {name: folders for name, folders in places.items() if len(folders) > 1} == {}
