"""Small networks that couple channels in the ways that real ones do."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Flat(nn.Module):
    """Convolutions, flatten, linear layers (VGG): one channel is 9 columns of the first linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.fc1 = nn.Linear(8 * 9, 10)
        self.fc2 = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


class PermutedFlat(nn.Module):
    """MTCNN's R-Net in small: width before height before channels, then flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.prelu1 = nn.PReLU(6)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.prelu2 = nn.PReLU(8)
        self.dense = nn.Linear(8 * 4 * 4, 10)
        self.head = nn.Linear(10, 2)
        self.boxes = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.prelu2(self.conv2(self.prelu1(self.conv1(x))))
        x = x.permute(0, 3, 2, 1).contiguous()
        x = self.dense(x.view(x.shape[0], -1))
        return self.boxes(x), F.softmax(self.head(x), dim=1)


class UNet(nn.Module):
    """Down, up by a transposed convolution, concatenation with the skip."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(6, 10, 3, stride=2, padding=1), nn.BatchNorm2d(10), nn.ReLU())
        self.up = nn.ConvTranspose2d(10, 8, 2, stride=2)
        self.fuse = nn.Conv2d(14, 7, 3, padding=1)
        self.head = nn.Conv2d(7, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = torch.cat([self.up(self.down(x)), x], dim=1)
        return self.head(F.relu(self.fuse(x)))


class Encoder(nn.Module):
    """A vision transformer's shape: patches, attention, MLP, positional parameter."""

    def __init__(self, *, packed: bool = True) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.position = nn.Parameter(torch.zeros(1, 16, 16))
        self.norm1 = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **({} if packed else {"kdim": 12, "vdim": 12}))
        self.norm2 = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        y = self.norm1(x)
        other = y if self.attention.in_proj_weight is not None else y[..., :12]
        x = x + self.attention(y, other, other, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


class Attention(nn.Module):
    """Hand-written attention with separate projections, as in Hugging Face models."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(x.shape[0], -1, 2, 4).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.down(F.gelu(self.up(x)))


class Recurrent(nn.Module):
    """Embedding, LSTM, linear classifier with a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.hidden = nn.Linear(6, 9)
        self.head = nn.Linear(9, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(tokens))
        return self.head(torch.tanh(self.hidden(states[:, -1])))


class Stacked(nn.Module):
    """Two bidirectional GRU layers whose outputs and final states are read."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.gru = nn.GRU(5, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.norm = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 3)
        self.other = nn.Linear(24, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        states, last = self.gru(self.embedding(tokens))
        return self.head(self.norm(states.mean(1))) + self.other(last.transpose(0, 1).flatten(1))


class Decoder(nn.Module):
    """A GRU layer whose final state starts a GRU cell that reads its own state step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.encoder = nn.LSTM(5, 7, batch_first=True)
        self.bridge = nn.Linear(7, 6)
        self.cell = nn.GRUCell(5, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        words = self.embedding(tokens)
        state = torch.tanh(self.bridge(self.encoder(words)[1][0][0]))
        outputs = []
        for step in range(words.shape[1]):
            state = self.cell(words[:, step], state)
            outputs.append(self.head(state))
        return torch.stack(outputs, 1)


class Translator(nn.Module):
    """A decoder cell that starts from its encoder's last state: their units are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.encoder = nn.GRU(5, 6, batch_first=True)
        self.decoder = nn.GRUCell(5, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        words = self.embedding(tokens)
        state = self.encoder(words)[1][0]
        outputs = []
        for step in range(words.shape[1]):
            state = self.decoder(words[:, step], state)
            outputs.append(self.head(state))
        return torch.stack(outputs, 1)


class Headed(nn.Module):
    """Attention that counts its heads: separate, fused by part or by head, grouped queries, a bias a head."""

    def __init__(self, *, fused: str = "", keys: int = 4) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim, self.inner_dim = 4, keys, 3, 12
        self.fused = fused
        if fused:
            self.qkv = nn.Linear(8, 36)
        else:
            self.query, self.key, self.value = nn.Linear(8, 12), nn.Linear(8, 3 * keys), nn.Linear(8, 3 * keys)
        self.table = nn.Parameter(torch.zeros(5, 4))
        self.out = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.fused:
            shape = (3, self.num_heads) if self.fused == "by part" else (self.num_heads, 3)
            parts = self.qkv(x).view(b, n, *shape, self.head_dim)
            q, k, v = parts.unbind(2 if self.fused == "by part" else 3)
        else:
            q = self.query(x).view(b, n, self.num_heads, self.head_dim)
            k, v = (f(x).view(b, n, self.num_kv_heads, self.head_dim) for f in (self.key, self.value))
            k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, 2) for t in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) + self.table[:n].t()[None, :, None, :]
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        return self.out(mixed.reshape(b, n, self.inner_dim))


class Transformer(nn.Module):
    """Two pre-norm blocks around `Headed`."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.blocks = nn.ModuleList(Headed(**options) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for norm, block in zip(self.norms, self.blocks):
            x = x + block(norm(x))
        return self.head(x.mean(1))


class Normed(nn.Module):
    """GroupNorm in two groups and LayerNorm over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.norm1 = nn.GroupNorm(4, 12)
        self.conv2 = nn.Conv2d(12, 6, 3, padding=1)
        self.norm2 = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.relu(self.norm1(self.conv1(x)))).mean((2, 3))
        return self.head(self.norm2(x))


class SqueezeExcite(nn.Module):
    """Depthwise convolution and a squeeze-excite gate on the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(4, 12, 1, bias=False), nn.BatchNorm2d(12), nn.SiLU())
        self.depthwise = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), nn.SiLU())
        self.squeeze, self.excite = nn.Conv2d(12, 5, 1), nn.Conv2d(5, 12, 1)
        self.project = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.project(y * gate)


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.down(F.relu(self.up(x))))


class Gated(nn.Module):
    """A gated linear unit: one layer makes value and gate, chunk splits them."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Conv2d(3, 16, 3, padding=1)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(x).chunk(2, dim=1)
        return self.out(value * torch.sigmoid(gate))


class Halves(nn.Module):
    """A split whose halves go to different layers (CSP): sizes are fixed in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Conv2d(3, 16, 3, padding=1)
        self.first, self.second = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = F.relu(self.both(x)).chunk(2, dim=1)
        return self.first(first) - self.second(second)


class Grouped(nn.Module):
    """A ResNeXt bottleneck: a convolution in four groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.conv3 = nn.Conv2d(8, 6, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))))


class Scale(nn.Module):
    """A custom layer with a parameter of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Custom(nn.Module):
    """A custom layer between two linear layers; dictionary in, dictionary out, one feature map returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.second = nn.Linear(6, 10), Scale(10), nn.Linear(10, 7)
        self.third, self.head = nn.Linear(7, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
        features = self.second(self.scale(self.first(x))) + shift
        return {"features": features, "logits": self.head(F.relu(self.third(features)))}


class Conv1D(nn.Module):
    """The transposed linear layer of GPT-2, by its public attributes."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


class TransposedMLP(nn.Module):
    """GPT-2's MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(12, 8), Conv1D(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c_proj(F.gelu(self.c_fc(x)))
