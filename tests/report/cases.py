"""Sample documents: the good case, a budget not met, a gate, an inspection, the smallest, a hostile one, a huge one."""

from __future__ import annotations

import math
import random

from eke.report import (
    BudgetLine,
    Calibrated,
    Control,
    Document,
    Drop,
    FrontPoint,
    Measured,
    PlanLine,
    Round,
    Score,
    SiteLine,
    Speedup,
    Split,
    Verdict,
)

NAMES = (
    "stem",
    "stages.0.0.conv1",
    "stages.0.0.conv2",
    "stages.1.0.conv1",
    "stages.1.0.conv2",
    "stages.1.0.skip",
    "stages.2.0.conv1",
    "stages.2.0.conv2",
    "stages.2.0.skip",
    "head",
)
RECIPE = """budget:
  drop: 1.0
  latency: 0.33x
  bytes: 0.08x
recovery: {steps: 900, learning_rate: 0.002}
seed: 0
"""
ENVIRONMENT = {
    "machine": "x86_64, 2 cores, AVX-512",
    "threads": "2",
    "torch": "2.15.0",
    "python": "3.11.7",
    "load while timing": "0.4",
}
SPLITS = (
    Split("calibration", 5000, 14, "statistics of the activations, recovery"),
    Split("selection", 2000, 6, "choosing and verifying plans"),
    Split("report", 5000, 1, "the numbers in the verdict"),
)


def score(correct: int, total: int = 5000) -> Score:
    share, z = correct / total, 1.959964
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return Score(share, correct, total, (middle - half, middle + half), 0.95, "Wilson")


def plan(names: tuple[str, ...] = NAMES, seed: int = 0) -> tuple[PlanLine, ...]:
    draw = random.Random(seed)
    lines = []
    for i, name in enumerate(names):
        predicted = 10 ** draw.uniform(-4, -1.6)
        before = draw.choice((1_152, 36_864, 147_456, 294_912))
        lines.append(
            PlanLine(
                name,
                draw.choice(("keep 41 of 64 channels, int4", "int8 by column sweep", "keep 88 of 128 channels, int3")),
                predicted,
                predicted * 10 ** draw.gauss(0, 0.15) if i % 4 else None,
                before,
                round(before * draw.uniform(0.04, 0.3)),
                draw.uniform(0.1, 1.9),
                draw.uniform(0.05, 0.6),
                "exact" if i % 3 else "reproduced",
            )
        )
    return tuple(lines)


def front(seed: int = 0) -> tuple[FrontPoint, ...]:
    draw = random.Random(seed)
    points = [
        FrontPoint("original", "original", 0.923, (0.9153, 0.9301), 1_240_000, 21.4, 79_000_000),
        FrontPoint("folded, channels_last", "control", 0.923, (0.9153, 0.9301), 1_236_000, 15.1, 78_600_000),
        FrontPoint("same net from scratch", "control", 0.9012, (0.8926, 0.9092), 96_800, 6.31, 22_100_000),
        FrontPoint("plan of round 2", "chosen", 0.9168, (0.9088, 0.9241), 96_800, 6.31, 22_100_000),
        FrontPoint("plan of round 1", "plan", 0.9096, (0.9013, 0.9172), 88_100, 5.9, 20_400_000),
    ]
    for i in range(26):
        part = draw.uniform(0.12, 0.95)
        fall = 0.06 * (1 - part) ** 3 + abs(draw.gauss(0, 0.002))
        points.append(
            FrontPoint(
                f"candidate {i + 1}",
                "candidate",
                0.923 - fall,
                None,
                round(1_240_000 * part * 0.6),
                21.4 * part * 0.9,
                round(79e6 * part),
                "predicted" if i % 3 else "measured",
            )
        )
    return tuple(points)


def calibration(seed: int = 1) -> tuple[Calibrated, ...]:
    draw = random.Random(seed)
    pairs = []
    for i in range(61):
        predicted = 10 ** draw.uniform(-4.3, -0.7)
        kind = ("channels", "grid", "low rank", "channels and grid")[i % 4]
        pairs.append(Calibrated(f"{NAMES[i % 10]}, {kind} {i}", kind, predicted, predicted * 10 ** draw.gauss(0, 0.13)))
    return tuple(pairs)


def good() -> Document:
    return Document(
        "compress",
        "Residual network, 0.31 M parameters, Fashion-MNIST",
        "0.1.0",
        "2026-11-21T21:40:00+00:00",
        Verdict(
            True,
            True,
            "At most 1 point and a third of the time were asked: the model is 3.39× faster, 12.8× smaller "
            "and 0.62 points below.",
        ),
        budget=(
            BudgetLine("drop", "at most 1 point", 1.0, 0.62, "points", True),
            BudgetLine("latency", "0.33x", 7.06, 6.31, "ms", True),
            BudgetLine("size", "0.08x", 99_200, 96_800, "bytes", True),
        ),
        before=Measured("original", score(4615), 1_240_000, 308_554, 79_000_000, 21.4, (21.1, 21.9), 9_400_000),
        after=Measured("compressed", score(4584), 96_800, 92_310, 22_100_000, 6.31, (6.2, 6.44), 3_100_000),
        drop=Drop(0.62, (0.28, 0.96), 0.95, "paired bootstrap", True, 1.0),
        speedups=(
            Speedup(3.39, (3.31, 3.47), 0.99, True, 2, 64, "the original"),
            Speedup(2.39, (2.33, 2.45), 0.99, True, 2, 64, "the original, folded and channels_last"),
        ),
        plan=plan(),
        front=front(),
        calibration=calibration(),
        controls=(
            Control(
                "From scratch",
                "The same small net from random weights, same images, steps and teacher",
                score(4506),
                Drop(1.56, (1.02, 2.1), 0.95, "paired bootstrap"),
                Speedup(3.38, (3.3, 3.46), 0.99, True, 2, 64),
                96_800,
                6.32,
            ),
            Control(
                "Folding + channels_last",
                "The untouched net, normalisation folded",
                score(4615),
                Drop(-0.62, (-0.96, -0.28), 0.95, "paired bootstrap"),
                Speedup(1.42, (1.38, 1.45), 0.99, True, 2, 64),
                1_236_000,
                15.1,
            ),
            Control(
                "Small net, all images",
                "Trained on all 55 000 images",
                score(4601),
                Drop(-0.34, (-0.83, 0.15), 0.95, "paired bootstrap"),
                None,
                371_000,
                6.4,
            ),
        ),
        splits=SPLITS,
        rounds=(
            Round(
                1,
                "Within every predicted budget; measured drop 1.34 points, above 1.0. Predictions rescaled by 1.4.",
            ),
            Round(2, "Plan verified: every measured value within its budget."),
        ),
        notes=("The small net trained on all images is the better choice when those images may be used.",),
        environment=ENVIRONMENT,
        recipe=RECIPE,
    )


def unmet() -> Document:
    return Document(
        "compress",
        "Keyword spotter on my_data.py:loaders",
        "0.1.0",
        "2026-11-21T21:40:00",
        Verdict(
            False, True, "A quarter of the time was asked; the best plan takes 0.41 of it and is 1.9 points below."
        ),
        budget=(
            BudgetLine("drop", "1%", 1.0, 1.9, "points", False),
            BudgetLine("latency", "0.25x", 2.0, 3.3, "ms", False),
            BudgetLine("size", "300 kB", 300_000, 211_000, "bytes", True),
        ),
        before=Measured("original", score(372, 400), 812_000, 201_000, 12_400_000, 8.0, (7.6, 8.5), 2_000_000),
        after=Measured("compressed", score(364, 400), 211_000, 61_000, 4_100_000, 3.3, (3.1, 3.6), 1_900_000),
        drop=Drop(1.9, (-0.4, 4.2), 0.95, "paired bootstrap", False, 1.0),
        speedups=(Speedup(2.42, (0.98, 2.9), 0.99, False, 1, 1, "the original"),),
        plan=plan(NAMES[:4]),
        splits=SPLITS,
        warnings=(
            "400 report samples cannot prove a drop of 1 point with 95 %: about 3 100 are needed.",
            "The machine was busy while timing (load 1.9 on 2 cores).",
        ),
        environment=ENVIRONMENT,
        recipe=RECIPE,
    )


def gate() -> Document:
    return Document(
        "gate",
        "release-41.safetensors against release-42.safetensors",
        "0.1.0",
        "2026-11-21T21:40:00+00:00",
        Verdict(
            True,
            True,
            "The new model may be at most 0.5 points worse and no slower: it is 0.1 points better and 1.21× faster.",
        ),
        budget=(
            BudgetLine("drop", "0.5", 0.5, -0.1, "points", True),
            BudgetLine("latency", "1.0x", 5.1, 4.2, "ms", True),
        ),
        before=Measured("old", score(4600), 1_240_000, None, None, 5.1),
        after=Measured("new", score(4605), 1_240_000, None, None, 4.2),
        drop=Drop(-0.1, (-0.42, 0.21), 0.95, "paired bootstrap", True, 0.5),
        speedups=(Speedup(1.21, (1.17, 1.26), 0.99, True, 2, 64, "old"),),
        environment=ENVIRONMENT,
    )


def inspect(count: int = 34) -> Document:
    draw = random.Random(5)
    lines = tuple(
        SiteLine(
            f"layer{i // 8}.{i % 8}.conv{1 + i % 2}",
            draw.choice(("conv", "conv", "linear")),
            (64 << i // 12, 576),
            36_864 << i // 12,
            draw.randrange(10**6, 10**9),
            draw.random() ** 3 / 5,
            10 ** draw.uniform(-5, -1),
        )
        for i in range(count)
    )
    return Document(
        "inspect",
        "resnet34",
        "0.1.0",
        "2026-11-21T21:40:00+00:00",
        Verdict(None, False, "34 sites hold 99.8 % of the parameters; four of them take half of the time."),
        before=Measured("resnet34", None, 87_300_000, 21_797_672, 7_340_000_000, 61.2, (59.8, 63.0), 118_000_000),
        sites=lines,
        environment=ENVIRONMENT,
    )


def tiny() -> Document:
    return Document(
        "compress", "net", "0.1.0", "2026-11-21", Verdict(None, False, "Nothing was asked and nothing was changed.")
    )


def perplexity() -> Document:
    """A metric of which less is better, with a relative drop."""

    def score(value: float) -> Score:
        name, method = "perplexity", "jackknife over 800 samples"
        return Score(value, interval=(0.97 * value, 1.04 * value), method=method, name=name, lower_is_better=True)

    base = good()
    points = tuple(
        FrontPoint(label, kind, value, (0.97 * value, 1.04 * value), size)  # type: ignore[arg-type]
        for label, kind, value, size in (
            ("original", "original", 23.1, 1_240_000),
            ("compressed", "chosen", 23.3, 96_800),
            ("from scratch", "control", 31.0, 96_800),
        )
    )
    return Document(
        "compress",
        "Language model",
        "0.1.0",
        base.created,
        Verdict(True, True, "File 12.8x smaller, perplexity 23.10 to 23.30 (0.87 % worse)."),
        budget=(BudgetLine("drop", "1%", 1.0, 0.87, "%", True),),
        before=Measured("original", score(23.1), 1_240_000),
        after=Measured("compressed", score(23.3), 96_800),
        drop=Drop(0.87, (0.31, 1.44), 0.95, "jackknife over 800 samples, paired", False, 1.0, "%"),
        front=points,
        controls=(Control("From scratch", "The same net", score(31.0)),),
    )


HOSTILE = '<script>alert("x")</script>&\'"\u202e\x00\ud800</title></style>'


def hostile() -> Document:
    s = HOSTILE
    m = Measured(s, Score(0.5, 1, 2, (0.1, 0.9), 0.95, s, s), 10, 10, 10, 1.0, (0.9, 1.1), 10)
    speed = Speedup(2.0, (1.9, 2.1), 0.99, True, 1, 1, s)
    return Document(
        "compress",
        s,
        s,
        s,
        Verdict(True, True, s),
        budget=(BudgetLine(s, s, 1.0, 0.5, s, True),),
        before=m,
        after=m,
        drop=Drop(0.1, (0.0, 0.2), 0.95, s, True, 1.0),
        speedups=(speed,),
        plan=(PlanLine(s, s, 0.1, 0.1, 10, 5, 1.0, 0.5, s),),
        front=tuple(
            FrontPoint(s, k, 0.5 + i / 10, (0.4, 0.96), 10 + i, 1.0 + i, 10 + i)
            for i, k in enumerate(("original", "chosen", "control"))
        ),
        controls=(Control(s, s, m.score, Drop(0.1, (0.0, 0.2), 0.95, s), speed, 10, 1.0),),
        calibration=(Calibrated(s, s, 0.1, 0.2), Calibrated(s, s, 0.2, 0.1)),
        sites=(SiteLine(s, s, (1, 2), 1, 1, 0.5, 0.1),),
        splits=(Split(s, 1, 1, s),),
        rounds=(Round(1, s),),
        notes=(s,),
        warnings=(s,),
        environment={s: s},
        recipe=s,
    )


def huge(count: int = 400) -> Document:
    names = tuple(f"encoder.layers.{i // 10}.attention.projection_{i % 10}.weight" for i in range(count))
    base = good()
    return Document(
        "compress",
        "A model of 400 sites",
        "0.1.0",
        base.created,
        base.verdict,
        base.budget,
        base.before,
        base.after,
        base.drop,
        base.speedups,
        plan(names),
        tuple(p for seed in range(8) for p in front(seed)),
        base.controls,
        tuple(p for seed in range(8) for p in calibration(seed)),
        inspect(count).sites,
        base.splits,
        base.rounds,
        base.notes,
        base.warnings,
        base.environment,
        base.recipe,
    )


CASES = {
    "good": good,
    "unmet": unmet,
    "gate": gate,
    "inspect": inspect,
    "tiny": tiny,
    "perplexity": perplexity,
    "hostile": hostile,
    "huge": huge,
}
