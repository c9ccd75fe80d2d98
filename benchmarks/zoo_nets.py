"""Small nets of every shape that people build: the hard cases of the zoo, seconds each.

A net is a function that builds it, a function that makes a batch of inputs (a tensor, a tuple or a dictionary), and,
where eke would not find them, the logits in its outputs.
"""

# ruff: noqa: D102

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence

Build = Callable[[], nn.Module]
Inputs = Callable[[int, torch.Generator], Any]


@dataclass(frozen=True)
class Net:
    """One net of the zoo.

    Args:
        build: Makes it, with random weights.
        inputs: Makes a batch of so many samples.
        logits: Finds the logits in what it returns, (batch, classes, ...); None takes eke's own way.
        refused: Whether a refusal is the right answer.
    """

    build: Build
    inputs: Inputs
    logits: Callable[[Any], Tensor] | None = None
    refused: bool = False


def images(channels: int, size: int) -> Inputs:
    """Return a maker of batches of images."""
    return lambda count, generator: torch.randn(count, channels, size, size, generator=generator)


def tokens(length: int, vocabulary: int) -> Inputs:
    """Return a maker of batches of token ids."""
    return lambda count, generator: torch.randint(0, vocabulary, (count, length), generator=generator)


def floats(*shape: int) -> Inputs:
    """Return a maker of batches of one shape."""
    return lambda count, generator: torch.randn(count, *shape, generator=generator)


class Recurrent(nn.Module):
    """Embedding, recurrent layers, and a linear layer on the last step."""

    def __init__(self, kind: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.layers = kind(16, 24, batch_first=True, **settings)
        width = settings.get("proj_size") or 24
        self.head = nn.Linear(width * (2 if settings.get("bidirectional") else 1), 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.words(x))[0][:, -1])


class Packed(nn.Module):
    """Sequences of different lengths, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.GRU(8, 16, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        _, last = self.layers(pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False))
        return self.head(last[-1])


class UNet(nn.Module):
    """Two levels with skip connections by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = _block(3, 8), _block(8, 16)
        self.middle = _block(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.join2, self.join1 = _block(32, 16), _block(16, 8)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        low = self.middle(F.max_pool2d(two, 2))
        two = self.join2(torch.cat([self.up2(low), two], 1))
        return self.head(self.join1(torch.cat([self.up1(two), one], 1)))


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class EncoderDecoder(nn.Module):
    """A transformer that reads one sequence and answers about another."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(40, 16), nn.Embedding(30, 16)
        self.net = nn.Transformer(16, 4, 1, 1, 32, 0.0, batch_first=True)
        self.head = nn.Linear(16, 30)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.net(self.source(source), self.target(target)))


class TwoInputs(nn.Module):
    """An image and a row of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 12, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.table = nn.Sequential(nn.Linear(6, 10), nn.ReLU())
        self.head = nn.Linear(22, 4)

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        return self.head(torch.cat([self.image(image), self.table(table)], 1))


class Dictionaries(nn.Module):
    """Takes keywords and returns a dictionary with a nested list."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.marks = nn.Embedding(30, 12), nn.Linear(3, 12)
        self.inner, self.head, self.other = nn.Linear(12, 20), nn.Linear(20, 4), nn.Linear(20, 2)

    def forward(self, words: Tensor, marks: Tensor) -> dict[str, Any]:
        hidden = torch.relu(self.inner(self.words(words).mean(1) + self.marks(marks)))
        return {"logits": self.head(hidden), "more": [self.other(hidden), {"hidden": hidden}]}


class Tied(nn.Module):
    """A language model whose output matrix is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 16)
        self.inner = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.words(x).mean(1)))


class Shared(nn.Module):
    """One convolution that is used at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        for _ in range(2):
            x = torch.relu(self.again(x)) + x
        return self.head(x.mean((2, 3)))


class Own(nn.Module):
    """A layer that nobody knows, between layers that everybody knows."""

    class Mix(nn.Module):
        """Its own matrix, scale and shift."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(width, width) / width**0.5)
            self.scale = nn.Parameter(torch.ones(width))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.matrix * self.scale)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), self.Mix(12), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class RNet(nn.Module):
    """Convolutions, a permutation of the axes, and two heads on the flattened rest, as in face detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 12, 3), nn.PReLU(12), nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Conv2d(12, 20, 3), nn.PReLU(20), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Conv2d(20, 24, 2), nn.PReLU(24),
        )  # fmt: skip
        self.dense, self.act = nn.Linear(24 * 9, 32), nn.PReLU()
        self.classes, self.box = nn.Linear(32, 2), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(x).permute(0, 3, 2, 1).contiguous()
        x = self.act(self.dense(x.flatten(1)))
        return self.classes(x), self.box(x)


class Gated(nn.Module):
    """Squeeze and excitation, gated halves, grouped and shuffled channels, GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.squeeze, self.excite = nn.Conv2d(16, 6, 1), nn.Conv2d(6, 16, 1)
        self.halves, self.grouped = nn.Conv2d(16, 24, 1), nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.first(x)))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = F.glu(self.halves(x), dim=1)
        n, c, h, w = (x := self.grouped(x)).shape
        x = x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.relu(x).mean((2, 3)))


class Autoencoder(nn.Module):
    """Down and up again by transposed convolutions; a class for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.up = nn.Sequential(
            nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.PixelShuffle(1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class Attention(nn.Module):
    """Patches, an encoder of nn.TransformerEncoderLayer, one token that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.encoder(x)[:, 0])


def _weight_normed() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def _spectral() -> nn.Module:
    conv = parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), conv, nn.ReLU(), nn.Conv2d(8, 12, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip


def _pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def _quantized() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def _transformers(kind: str, **settings: Any) -> Build:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, kind[: kind.index("For")] + "Config")(**settings)
        config.use_cache = False
        return getattr(transformers, kind)(config)

    return build


def _named(**makers: Inputs) -> Inputs:
    return lambda count, generator: {name: make(count, generator) for name, make in makers.items()}


def _both(*makers: Inputs) -> Inputs:
    return lambda count, generator: tuple(make(count, generator) for make in makers)


def _lengths(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, 7, (count,), generator=generator)


def _last_class(output: Any) -> Tensor:
    """Return logits with the classes in second place."""
    logits = output if isinstance(output, Tensor) else output["logits"]
    return logits.movedim(-1, 1)


_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT = {**_SIZES, "vocab_size": 60, "max_position_embeddings": 32}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

NETS: dict[str, Net] = {
    "lstm": Net(lambda: Recurrent(nn.LSTM), tokens(9, 50)),
    "lstm_two_ways": Net(lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), tokens(9, 50)),
    "lstm_projected": Net(lambda: Recurrent(nn.LSTM, proj_size=8), tokens(9, 50)),
    "gru": Net(lambda: Recurrent(nn.GRU, num_layers=2), tokens(9, 50)),
    "rnn": Net(lambda: Recurrent(nn.RNN), tokens(9, 50)),
    "packed": Net(Packed, _both(floats(6, 8), _lengths)),
    "unet": Net(UNet, images(3, 16)),
    "autoencoder": Net(Autoencoder, images(1, 16)),
    "encoder_decoder": Net(EncoderDecoder, _both(tokens(7, 40), tokens(5, 30)), _last_class),
    "two_inputs": Net(TwoInputs, _both(images(3, 12), floats(6))),
    "dictionaries": Net(Dictionaries, _named(words=tokens(5, 30), marks=floats(3))),
    "tied": Net(Tied, tokens(6, 30)),
    "shared": Net(Shared, images(3, 10)),
    "weight_norm": Net(_weight_normed, floats(8)),
    "spectral_norm": Net(_spectral, images(3, 10)),
    "own_layer": Net(Own, floats(8)),
    "pruned": Net(_pruned, floats(8)),
    "quantized": Net(_quantized, floats(8), refused=True),
    "rnet": Net(RNet, images(3, 24)),
    "gated": Net(Gated, images(3, 10)),
    "attention": Net(Attention, images(3, 16)),
    "conv1d": Net(
        lambda: nn.Sequential(
            nn.Conv1d(2, 12, 5), nn.BatchNorm1d(12), nn.ReLU(), nn.Conv1d(12, 16, 3), nn.ReLU(),
            nn.AdaptiveMaxPool1d(2), nn.Flatten(), nn.Linear(32, 4),
        ),
        floats(2, 40),
    ),
    "conv3d": Net(
        lambda: nn.Sequential(
            nn.Conv3d(1, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1),
            nn.Flatten(), nn.Linear(12, 4),
        ),
        floats(1, 8, 8, 8),
    ),
    "bert": Net(
        _transformers("BertForSequenceClassification", num_labels=3, **_TEXT), _named(input_ids=tokens(12, 60))
    ),
    "gpt2": Net(
        _transformers(
            "GPT2ForSequenceClassification", n_embd=32, n_layer=2, n_head=4,
            vocab_size=60, n_positions=32, num_labels=3, **_ENDS,
        ),
        _named(input_ids=tokens(12, 60)),
    ),
    "llama": Net(
        _transformers("LlamaForCausalLM", num_key_value_heads=2, **_TEXT, **_ENDS),
        _named(input_ids=tokens(12, 60)), _last_class,
    ),
    "t5": Net(
        _transformers(
            "T5ForConditionalGeneration", d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=60,
            decoder_start_token_id=0,
        ),
        _named(input_ids=tokens(12, 60), decoder_input_ids=tokens(6, 60)), _last_class,
    ),
    "hf_vit": Net(
        _transformers("ViTForImageClassification", image_size=32, patch_size=8, num_labels=5, **_SIZES),
        _named(pixel_values=images(3, 32)),
    ),
}  # fmt: skip
