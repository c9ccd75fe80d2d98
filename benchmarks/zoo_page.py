"""Write docs/which-models.md from the results of the zoo.

python benchmarks/zoo_page.py [--check]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "which-models.md"
RIVALS = {"torch": "torch.utils.flop_counter", "fvcore": "fvcore", "ptflops": "ptflops"}

Rows = Sequence[dict[str, Any]]


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, words: Sequence[int] = (0,)) -> str:
    """Return a Markdown table; columns but those of words are set to the right."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---" if column in words else "---:" for column in range(len(head))], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def short(number: float) -> str:
    """Return a number with three digits and a prefix."""
    for factor, sign in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g}{sign}"
    return f"{number:.3g}"


def families(rows: Rows) -> str:
    """Return one line a family: how many ran, how much of a typical one can be cut, and what most often cannot."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["family"]].append(row)
    lines = []
    for family, members in sorted(found.items()):
        ran = [row for row in members if row["ok"]]
        if not ran:
            lines.append([family, f"0 of {len(members)}", "", "", "", ""])
            continue
        reasons: Counter[str] = Counter()
        for row in ran:
            reasons.update(row["whole"])
        middle: Callable[[str], str] = lambda key, ran=ran: f"{statistics.median(row[key] for row in ran):g}"  # noqa: E731
        whole = f"{statistics.median(sum(row['whole'].values()) for row in ran):g}"
        most = reasons.most_common(1)[0][0] if reasons else ""
        lines.append([family, f"{len(ran)} of {len(members)}", middle("sites"), middle("groups"), whole, most])
    head = ["family", "ran", "matrices", "channel groups", "layers whole", "most frequent reason"]
    return table(head, lines, words=(0, 5))


def counters(rows: Rows) -> str:
    """Return one line for each counter: where it ran, and how its number compares with eke's."""
    lines = []
    for key, name in RIVALS.items():
        ran = [row for row in rows if row["counters"].get(key)]
        if not ran:
            continue
        factor = 1 if key == "torch" else 2
        ratios = sorted(factor * row["counters"][key] / row["flops"] for row in ran)
        same = sum(ratio == 1 for ratio in ratios)
        spread = f"{ratios[0]:.3f} / {statistics.median(ratios):.3f} / {ratios[-1]:.3f}"
        lines.append([name, f"{len(ran)} of {len(rows)}", factor, same, spread])
    head = ["counter", "ran", "times", "models where it equals eke's", "least / median / largest ratio to eke's"]
    return table(head, lines)


def causes(rows: Rows) -> str:
    """Return one line for each cause of a difference: on how many models, and which share of eke's count."""
    shares: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        for rival, found in row["counters"]["causes"].items():
            for cause, count in found.items():
                shares[rival, cause].append(count / row["flops"])
    lines = []
    for (rival, cause), found in sorted(
        shares.items(), key=lambda item: (list(RIVALS).index(item[0][0]), -len(item[1]))
    ):
        low, middle, high = min(found), statistics.median(found), max(found)
        lines.append([RIVALS[rival], cause, len(found), f"{low:+.2%} / {middle:+.2%} / {high:+.2%}"])
    head = ["counter", "cause", "models", "least / median / largest share of eke's count"]
    return table(head, lines, words=(0, 1))


def reasons(rows: Rows, most: int = 20) -> str:
    """Return one line for each reason why channels stay whole."""
    layers: Counter[str] = Counter()
    models: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        layers.update(row["whole"])
        for reason in row["whole"]:
            models[reason].append(row["name"])
    lines = [[reason, count, len(models[reason]), models[reason][0]] for reason, count in layers.most_common(most)]
    return table(["reason", "layers", "models", "for example"], lines, words=(0, 3))


def errors(rows: Rows) -> str:
    """Return one line for each model that did not run, or a sentence."""
    bad = [[row["name"], row.get("module") or "", row["error"][:160]] for row in rows if not row["ok"]]
    return table(["model", "module", "error"], bad, words=(0, 1, 2)) if bad else "All of them ran."


def models(rows: Rows) -> str:
    """Return one line a model."""
    lines = [
        [
            row["name"], "x".join(map(str, row["input"])), short(row["parameters"]), short(row["flops"]), row["sites"],
            row["groups"], sum(row["whole"].values()), f"{row['seconds']['inspect']:.0f}",
        ]
        for row in rows
        if row["ok"]
    ]  # fmt: skip
    head = ["model", "input", "parameters", "FLOPs", "matrices", "channel groups", "layers whole", "seconds"]
    return table(head, lines)


def compressed(rows: Rows) -> str:
    """Return one line for each model that was compressed."""
    lines = []
    for row in rows:
        if not row["ok"]:
            lines.append([row["name"], row["error"][:120], "", "", "", ""])
            continue
        size = f"{short(row['bytes'][0])}B → {short(row['bytes'][1])}B" if "bytes" in row else ""
        answer = row["answer"] if row["answer"] != "refused" else f"refused: {row['said'][:100]}"
        answer += " at 0.9x" if row["answer"] == "verified" and row["share"] != 0.5 else ""
        lines.append([row["name"], answer, size, row["groups"], f"{row['worst']:.1e}", len(row["wrong"])])
    head = ["model", "answer", "bytes", "channel groups", "worst cut against mask", "wrong cuts"]
    return table(head, lines, words=(0, 1))


def page(inspected: dict[str, Any], compress: dict[str, Any] | None) -> str:
    """Return the page.

    Args:
        inspected: Result of the part `inspect`.
        compress: Result of the part `compress`, if there is one.
    """
    rows = inspected["rows"]
    ran = [row for row in rows if row["ok"]]
    libraries = Counter(row["name"].partition(":")[0] for row in rows)
    asked = " and ".join(f"{count} of {library}" for library, count in libraries.items())
    parts = [
        "# Which models",
        "<!-- written by benchmarks/zoo_page.py; do not edit -->",
        "eke reads plain PyTorch modules, so there is no list of supported architectures. What it makes of models that "
        f"it was not written for was asked of {len(rows)} networks for images, {asked}, with random weights and images "
        "as small as each takes (64 pixels for most): structure is the question here, not speed. Every one ran in a "
        f"process of its own; **`eke inspect` ran on {len(ran)} of {len(rows)} ({len(ran) / len(rows):.1%})**.",
        errors(rows),
        "Channels can be cut where a cut was proved on this very model: masked and cut networks agree to 1e-6 in "
        "float64. Layers that stay whole are still put on grids, made sparse or low-rank. Medians of each family:",
        families(rows),
        "## Why channels stay whole",
        reasons(ran),
        "## FLOPs against other counters",
        "eke counts 2 for each multiply-add of matrix products, convolutions, attention and recurrent layers, and "
        "nothing else. `times` is what the other count is multiplied by for the comparison. Every difference has its "
        "cause below: each counter's number is eke's minus the sum of the causes, exactly, for every model.",
        counters(ran),
        causes(ran),
    ]
    if compress is not None:
        done = compress["rows"]
        good = [row for row in done if row["ok"] and row["answer"] in ("verified", "refused") and not row["wrong"]]
        parts += [
            "## Compressed end to end",
            f"`eke.compress` to half the bytes (to 0.9 where half is impossible), without recovery, on {len(done)} "
            f"models; {len(good)} end in a result that is the same after loading it into a freshly built model, or in "
            "a refusal that names the module. Every channel group was cut on the real weights in float64 and compared "
            "with its mask.",
            compressed(done),
        ]
    parts += [
        "## Every model",
        f"Seconds of the processor, one thread, on {inspected['environment']['cpu']}.",
        models(rows),
    ]
    return "\n\n".join(parts) + "\n"


def read() -> str:
    """Return the page of the committed results."""
    found = [RESULTS / f"zoo_{part}.json" for part in ("inspect", "compress")]
    documents = [json.loads(path.read_text(encoding="utf-8")) if path.exists() else None for path in found]
    assert documents[0] is not None, f"{found[0]} is missing: run benchmarks/zoo.py inspect"
    return page(documents[0], documents[1])


def main() -> None:
    """Write the page, or say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the page is not what the results say")
    if parser.parse_args().check:
        raise SystemExit(PAGE.read_text(encoding="utf-8") != read())
    PAGE.write_text(read(), encoding="utf-8")


if __name__ == "__main__":
    main()
