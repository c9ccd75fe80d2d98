"""Trained beside each other: what does a linear transformer lose in bits, and what does it gain in speed?

Question: characters of `pydoc_data.topics` and pixels of Fashion-MNIST (pooled to 14 x 14, 16 levels, one after the
other), each with the same network, data, order of batches and number of steps; only attention differs: softmax, linear
(elu + 1, the same number of parameters) and linear with a gate a head (about 1 % more). Held out: bits a symbol; how
many symbols a second `LinearTransformerForCausalLM` generates on a state or a cache of keys, one native step a token.
Method: AdamW with warm-up and cosine, one thread, float32. The networks are small and see little: an example, not a
comparison of what either attention reaches in the end. Thread time.

    python benchmarks/linear_generation.py --images FOLDER [--json FILE] [--picture FILE] [--smoke]
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eke.cost import environment
from eke.nn.generation_cache import new_cache
from eke.nn.hugging_face import LinearTransformerConfig, LinearTransformerForCausalLM

ATTENTIONS: dict[str, dict[str, Any]] = {
    "softmax": {"kind": "full_attention"},
    "linear": {"kind": "linear_attention"},
    "linear with gates": {"kind": "linear_attention", "decay": "scalar"},
}
SIDE, LEVELS = 14, 16
PROMPT = "The import statement"


def characters() -> tuple[Tensor, Tensor, list[str]]:
    """Return training text, held-out text (its last twentieth), and the alphabet."""
    from pydoc_data.topics import topics

    text = "\n".join(topics.values())
    alphabet = sorted(set(text))
    number = {letter: i for i, letter in enumerate(alphabet)}
    data = torch.tensor([number[letter] for letter in text])
    cut = len(data) * 19 // 20
    return data[:cut], data[cut:], alphabet


def windows(data: Tensor, count: int, length: int, generator: torch.Generator | None) -> Tensor:
    """Return pieces of a text: random ones, or without a generator ones spread evenly over it."""
    if generator is None:
        starts = torch.linspace(0, len(data) - length - 1, count).long()
    else:
        starts = torch.randint(len(data) - length, (count,), generator=generator)
    return torch.stack([data[s : s + length] for s in starts])


def pixels(folder: Path, name: str) -> Tensor:
    """Return images as rows of levels behind a first symbol, (images, 1 + 14 * 14)."""
    with gzip.open(folder / f"{name}-images-idx3-ubyte.gz") as file:
        raw = torch.frombuffer(bytearray(file.read()[16:]), dtype=torch.uint8).reshape(-1, 1, 28, 28)
    pooled = torch.nn.functional.avg_pool2d(raw.float(), 2).flatten(1)
    levels = (pooled / 256 * LEVELS).long()
    return torch.cat([torch.full((len(levels), 1), LEVELS), levels], 1)


def network(attention: dict[str, Any], *, width: int, vocabulary: int, length: int) -> Any:
    """Return a network with random weights, the same ones for every attention where they have the same shape."""
    torch.manual_seed(0)
    config = LinearTransformerConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=4 * width, layer_types=[attention["kind"]] * 4, decay=attention.get("decay"),
        max_position_embeddings=length,
    )  # fmt: skip
    return LinearTransformerForCausalLM(config)


def train(model: Any, batches: Any, steps: int, rate: float) -> float:
    """Train, and return the seconds of the thread."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, 0.5 * (1 + math.cos(math.pi * i / steps)) + 0.02)
    )
    start = time.thread_time()
    model.train()
    for i in range(steps):
        batch = batches(i)
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    return time.thread_time() - start


@torch.no_grad()
def bits(model: Any, rows: Tensor) -> float:
    """Return bits a symbol over rows, the first symbol of each given."""
    return float(sum(model(part, labels=part).loss * len(part) for part in rows.split(32))) / len(rows) / math.log(2)


@torch.no_grad()
def sample(model: Any, start: Tensor, length: int) -> tuple[Tensor, float]:
    """Draw symbols behind a start; return all of them and the seconds of the thread for those drawn."""
    generator = torch.Generator().manual_seed(1)
    cache = new_cache(model.config)
    logits = model(start, past_key_values=cache).logits[:, -1]
    symbols, began = [start], time.thread_time()
    for i in range(length - start.shape[1]):
        token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        symbols.append(token)
        if i + 1 < length - start.shape[1]:
            logits = model(token, past_key_values=cache).logits[:, -1]
    return torch.cat(symbols, 1), time.thread_time() - began


def gate(model: Any, rows: Tensor) -> None:
    """Stop unless generation one by one gives what whole rows give."""
    with torch.no_grad():
        whole, cache = model(rows).logits, new_cache(model.config)
        model(rows[:, :1], past_key_values=cache)
        steps = [model(rows[:, t : t + 1], past_key_values=cache).logits for t in range(1, rows.shape[1])]
    error = float((torch.cat(steps, 1) - whole[:, 1:]).abs().max())
    if not error < 1e-3:
        raise SystemExit(f"gate: steps and whole rows differ by {error:.1e}")


def png(image: Tensor) -> bytes:
    """Return a grey picture (rows, columns) of bytes as PNG."""
    rows, columns = image.shape
    body = zlib.compress(b"".join(b"\0" + bytes(row.tolist()) for row in image), 9)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def picture(rows: list[Tensor]) -> Tensor:
    """Return one line of images for each tensor (images, 196) of levels, four times enlarged."""
    lines = []
    for images in rows:
        tiles = 255 - (images.clamp(max=LEVELS - 1) * 255 // (LEVELS - 1)).reshape(-1, SIDE, SIDE)
        framed = torch.nn.functional.pad(tiles, (1, 1, 1, 1), value=255)
        lines.append(torch.cat(list(framed), 1))
    grid = torch.cat(lines, 0)
    return grid.repeat_interleave(4, 0).repeat_interleave(4, 1).to(torch.uint8)


def case(task: str, held: Tensor, batches: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Train and measure each attention on one task."""
    found: dict[str, Any] = {"task": task, **{k: options[k] for k in ("width", "length", "steps", "batch")}, "rows": {}}
    for name, attention in ATTENTIONS.items():
        model = network(attention, width=options["width"], vocabulary=options["vocabulary"], length=options["length"])
        seconds = train(model, batches, options["steps"], options["rate"])
        gate(model, held[:2])
        row: dict[str, Any] = {
            "parameters": sum(p.numel() for p in model.parameters()), "training_seconds": seconds,
            "bits": bits(model, held), "symbols_per_second": {},
        }  # fmt: skip
        for batch in options["batches"]:
            start = options["start"].expand(batch, -1)
            best = min(sample(model, start, options["length"])[1] for _ in range(2))
            row["symbols_per_second"][str(batch)] = batch * (options["length"] - start.shape[1]) / best
        row["symbols"], _ = sample(model, options["start"].expand(options["shown"], -1), options["length"])
        found["rows"][name] = row
        print(task, name, {k: v for k, v in row.items() if k != "symbols"}, flush=True)
    return found


def letters(smoke: bool) -> dict[str, Any]:
    """Train and measure on characters."""
    text, rest, alphabet = characters()
    length, batch = (32, 4) if smoke else (192, 8)

    def pieces(i: int) -> Tensor:
        return windows(text, batch, length, torch.Generator().manual_seed(i))

    first = torch.tensor([[alphabet.index(letter) for letter in PROMPT]])
    found = case("characters", windows(rest, 4 if smoke else 128, length, None), pieces, {
        "width": 32 if smoke else 128, "vocabulary": len(alphabet), "length": length, "steps": 3 if smoke else 400,
        "batch": batch, "rate": 3e-3, "batches": [1, 4] if smoke else [1, 32], "start": first, "shown": 2,
    })  # fmt: skip
    for row in found["rows"].values():
        row["symbols"] = ["".join(alphabet[int(n)] for n in line) for line in row["symbols"]]
    return found


def drawings(folder: Path, target: Path | None, smoke: bool) -> dict[str, Any]:
    """Train and measure on pixels, and write what was drawn."""
    images, others = pixels(folder, "train"), pixels(folder, "t10k")
    many = 2 if smoke else 16

    def shuffled(i: int) -> Tensor:
        return images[torch.randint(len(images), (many,), generator=torch.Generator().manual_seed(i))]

    found = case("pixels", others[: 4 if smoke else 512], shuffled, {
        "width": 32 if smoke else 64, "vocabulary": LEVELS + 1, "length": 1 + SIDE * SIDE, "steps": 2 if smoke else 300,
        "batch": many, "rate": 3e-3, "batches": [1, 4] if smoke else [1, 32], "start": torch.tensor([[LEVELS]]),
        "shown": 12,
    })  # fmt: skip
    shown = [others[:12, 1:], *(row.pop("symbols")[:, 1:] for row in found["rows"].values())]
    if target:
        target.write_bytes(png(picture(shown)))
    return found


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with the idx files, gzipped")
    parser.add_argument(
        "--only", choices=["characters", "pixels"], help="one task; the other stays as it is in the file"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--smoke", action="store_true", help="three steps: seconds, no conclusions")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    smoke = arguments.smoke
    cases: list[dict[str, Any]] = []
    if arguments.only != "pixels":
        cases.append(letters(smoke))
    if arguments.only != "characters":
        cases.append(drawings(arguments.images, arguments.picture, smoke))
    document = {
        "question": __doc__.splitlines()[0], "smoke": smoke, "threads": 1, "environment": environment().to_json(),
        "cases": cases,
    }  # fmt: skip
    if arguments.json:
        if arguments.only and arguments.json.exists():
            before = json.loads(arguments.json.read_text())["cases"]
            cases += [entry for entry in before if entry["task"] != arguments.only]
            cases.sort(key=lambda entry: entry["task"])
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
