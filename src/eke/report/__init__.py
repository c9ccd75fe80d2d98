"""Reports: one immutable JSON document, drawn as a self-contained HTML page or as lines in a terminal.

The room knows nothing of eke and nothing of torch: `Document` is numbers and words, `html` and `terminal` draw it.
"""

from . import html, terminal
from .document import (
    SCHEMA,
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

__all__ = [
    "SCHEMA",
    "BudgetLine",
    "Calibrated",
    "Control",
    "Document",
    "Drop",
    "FrontPoint",
    "Measured",
    "PlanLine",
    "Round",
    "Score",
    "SiteLine",
    "Speedup",
    "Split",
    "Verdict",
    "html",
    "terminal",
]
