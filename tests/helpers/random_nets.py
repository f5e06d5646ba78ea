"""Random networks of every kind of wiring, as programs over streams of channels."""

import random

import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers.strippable import with_statistics

ACTIVATIONS = [
    nn.ReLU,
    nn.ReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.Hardswish,
    nn.SiLU,
    nn.LeakyReLU,
    nn.PReLU,
    lambda: nn.Threshold(0.7, 0.0),
    lambda: nn.Threshold(-0.5, 0.2),
    nn.Identity,
]


class _Streams(list):
    """Streams of a run that note which of them are read."""

    def __init__(self, streams):
        super().__init__(streams)
        self.read = set()

    def __getitem__(self, i):
        self.read.add(i)
        return super().__getitem__(i)


class RandomNet(nn.Module):
    """Steps, each a function of earlier streams: what ``seed`` draws.

    ``steps`` tells them in words. Each stream reaches an output. Some networks have a second
    input, several outputs, a layer that is called several times, or a head that runs only while
    training.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        self.layers = nn.ModuleList()
        self.program = []
        self.steps = []
        self.widths, self.scales = [3], [0]  # channels and halvings of each stream
        self.two = self.rng.random() < 0.2
        if self.two:
            self.widths.append(2)
            self.scales.append(0)
        for stream in range(len(self.widths)):
            self._conv(stream)
        for _ in range(self.rng.randint(3, 12)):
            getattr(self, self.rng.choice(self._kinds()))(self._any())
        self._finish()
        with_statistics(self, seed)
        self.kill()

    def _kinds(self):
        return [
            *["_conv"] * 5, "_block", "_block", "_sum", "_sum", "_cat", "_cat", "_depthwise",
            "_grouped", "_shuffle", "_split", "_pad", "_option_a", "_shared", "_pool", "_gate",
            "_repvgg", "_preact", "_upsample", "_focus", "_c2f", "_spatial_gate", "_group_norm",
            "_attention", "_transposed", "_shufflenet", "_instance", "_shift", "_fixed", "_mean",
            "_slices", "_padded_in_forward", "_relu_minus", "_ibn", "_softmax", "_bilinear",
            "_max_over_channels", "_prelu",
        ]  # fmt: skip

    # Building ------------------------------------------------------------------------

    def _any(self):
        return self.rng.randrange(max(0, len(self.widths) - 4), len(self.widths))

    def _layer(self, layer):
        self.layers.append(layer)
        return len(self.layers) - 1

    def _step(self, function, width, scale, text):
        self.program.append(function)
        self.steps.append(text)
        self.widths.append(width)
        self.scales.append(scale)
        return len(self.widths) - 1

    def _act(self):
        return self.rng.choice(ACTIVATIONS)()

    def _width(self):
        return self.rng.choice([4, 4, 6, 8, 8, 12])

    def _conv_layer(self, inputs, filters, kernel=None, norm=True, act=True, **conv):
        kernel = kernel or self.rng.choice([1, 3, 3])
        mode = self.rng.choice(["zeros"] * 5 + ["reflect", "replicate"])
        layers = [
            nn.Conv2d(
                inputs, filters, kernel, padding=kernel // 2, padding_mode=mode,
                bias=self.rng.random() < 0.4, **conv,
            )
        ]  # fmt: skip
        if norm:
            layers.append(nn.BatchNorm2d(filters))
        if act:
            layers.append(self._act())
        return nn.Sequential(*layers)

    def _conv(self, x, filters=None, stride=1, **options):
        filters = filters or self._width()
        n = self._layer(self._conv_layer(self.widths[x], filters, stride=stride, **options))
        scale = self.scales[x] + (stride == 2)
        return self._step(
            lambda m, s: m.layers[n](s[x]), filters, scale, f"{len(self.widths)} = conv({x})"
        )

    def _block(self, x):
        c = self.widths[x]
        y = self._conv(x, self._width())
        y = self._conv(y, c, act=False)
        return self._step(
            lambda m, s: F.relu(s[x] + s[y]),
            c,
            self.scales[x],
            f"{len(self.widths)} = relu({x}+{y})",
        )

    def _sum(self, x):
        c = self.widths[x]
        a, b = (self._conv(x, c, act=self.rng.random() < 0.3) for _ in range(2))
        act = self._layer(self._act())
        return self._step(
            lambda m, s: m.layers[act](s[a] + s[b]), c, self.scales[x], f"act({a}+{b})"
        )

    def _same_scale(self, x):
        return [
            i for i in range(1, len(self.widths)) if self.scales[i] == self.scales[x] and i != x
        ]

    def _cat(self, x):
        others = self._same_scale(x)
        if not others:
            return x
        y = self.rng.choice(others)
        if self.widths[x] + self.widths[y] > 32:
            return x
        return self._step(
            lambda m, s: torch.cat([s[x], s[y]], 1),
            self.widths[x] + self.widths[y],
            self.scales[x],
            f"{len(self.widths)} = cat({x},{y})",
        )

    def _depthwise(self, x):
        c = self.widths[x]
        times = self.rng.choice([1, 1, 2])
        return self._conv(x, c * times, groups=c, kernel=3)

    def _grouped(self, x):
        c = self.widths[x]
        if c % 2:
            return x
        return self._conv(x, self.rng.choice([4, 8, 12]), groups=2)

    def _shuffle(self, x):
        c = self.widths[x]
        groups = self.rng.choice([g for g in (1, 2, 3, 4) if c % g == 0])
        by_hand = self.rng.random() < 0.5

        def run(m, s):
            y = s[x]
            if not by_hand:
                return F.channel_shuffle(y, groups)
            n, c, h, w = y.shape
            return y.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)

        return self._step(run, c, self.scales[x], f"{len(self.widths)} = shuffle{groups}({x})")

    def _split(self, x):
        c = self.widths[x]
        if c < 4 or c % 2:
            return x
        a = self._conv_only(c // 2)
        b = self._conv_only(c // 2)

        def run(m, s):
            left, right = s[x].chunk(2, 1)
            return torch.cat([m.layers[a](right), m.layers[b](left)], 1)

        return self._step(run, 16, self.scales[x], f"{len(self.widths)} = split({x})")

    def _conv_only(self, inputs, filters=8, **options):
        return self._layer(self._conv_layer(inputs, filters, **options))

    def _fixed(self, x):
        """Pieces of a number of channels that the code says."""
        c = self.widths[x]
        if c < 4:
            return x
        a, b = self._conv_only(4), self._conv_only(c - 4) if c > 4 else None

        def run(m, s):
            first, *rest = s[x].split([4, c - 4] if c > 4 else 4, 1)
            y = m.layers[a](first)
            return y + m.layers[b](rest[0]) if b is not None else y

        return self._step(run, 8, self.scales[x], f"{len(self.widths)} = fixed({x})")

    def _slices(self, x):
        c = self.widths[x]
        if c < 4:
            return x
        a, b = self._conv_only(len(range(0, c, 2))), self._conv_only(2)

        def run(m, s):
            return m.layers[a](s[x][:, ::2]) + m.layers[b](s[x][:, -2:])

        return self._step(run, 8, self.scales[x], f"{len(self.widths)} = slices({x})")

    def _pad(self, x):
        c, before, after = self.widths[x], self.rng.randint(0, 2), self.rng.randint(0, 2)
        return self._step(
            lambda m, s: F.pad(s[x], (0, 0, 0, 0, before, after)),
            c + before + after,
            self.scales[x],
            f"{len(self.widths)} = pad({x})",
        )

    def _option_a(self, x):
        c = self.widths[x]
        if self.scales[x] >= 2 or c > 16:
            return x
        y = self._conv(x, 2 * c, act=False, stride=2, kernel=3)

        def run(m, s):
            short = F.pad(s[x][:, :, ::2, ::2], (0, 0, 0, 0, c // 2, c - c // 2))
            return F.relu(s[y] + short)

        return self._step(run, 2 * c, self.scales[y], f"{len(self.widths)} = option_a({x},{y})")

    def _shared(self, x):
        """One layer for two streams, with a norm of its own for each."""
        c = self.widths[x]
        y = self._conv(x, c)
        shared, out = self._layer(nn.Conv2d(c, 8, 3, padding=1)), self._conv_only(8)
        norms = [self._layer(nn.BatchNorm2d(8)) for _ in range(2)]

        def run(m, s):
            found = [
                m.layers[out](F.relu(m.layers[n](m.layers[shared](s[i]))))
                for n, i in zip(norms, (x, y), strict=True)
            ]
            return torch.cat(found, 1)

        return self._step(run, 16, self.scales[x], f"{len(self.widths)} = shared({x},{y})")

    def _pool(self, x):
        if self.scales[x] >= 2:
            return x
        pool = self._layer(
            self.rng.choice(
                [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1)]
            )
        )
        return self._step(
            lambda m, s: m.layers[pool](s[x]), self.widths[x], self.scales[x] + 1,
            f"{len(self.widths)} = {self.layers[pool]}({x})",
        )  # fmt: skip

    def _gate(self, x):
        c = self.widths[x]
        down, up = self._layer(nn.Conv2d(c, 4, 1)), self._layer(nn.Conv2d(4, c, 1))
        gate = self.rng.choice([torch.sigmoid, F.hardsigmoid])

        def run(m, s):
            y = s[x].mean((2, 3), keepdim=True)
            return s[x] * gate(m.layers[up](F.relu(m.layers[down](y))))

        return self._step(run, c, self.scales[x], f"{len(self.widths)} = gate({x})")

    def _spatial_gate(self, x):
        gate = self._layer(nn.Conv2d(self.widths[x], 1, 1))
        return self._step(
            lambda m, s: s[x] * torch.sigmoid(m.layers[gate](s[x])), self.widths[x],
            self.scales[x], f"{len(self.widths)} = spatial_gate({x})",
        )  # fmt: skip

    def _repvgg(self, x):
        c = self.widths[x]
        a, b = (self._conv_only(c, c, kernel=k, act=False) for k in (3, 1))
        identity = self._layer(nn.BatchNorm2d(c))
        parts = (a, b, identity)
        return self._step(
            lambda m, s: F.relu(sum(m.layers[i](s[x]) for i in parts)), c, self.scales[x],
            f"{len(self.widths)} = repvgg({x})",
        )  # fmt: skip

    def _preact(self, x):
        c = self.widths[x]
        norm, act = self._layer(nn.BatchNorm2d(c)), self._layer(self._act())
        conv = self._layer(nn.Conv2d(c, c, 3, padding=1))
        return self._step(
            lambda m, s: s[x] + m.layers[conv](m.layers[act](m.layers[norm](s[x]))), c,
            self.scales[x], f"{len(self.widths)} = preact({x})",
        )  # fmt: skip

    def _upsample(self, x):
        if not self.scales[x]:
            return x
        mode = self.rng.choice(["nearest", "bilinear"])
        others = [i for i in range(len(self.widths)) if self.scales[i] == self.scales[x] - 1]
        y = self.rng.choice(others) if others else None
        if y is None:
            return x
        # To the very size of another stream, as in an FPN.
        n = self._conv_only(self.widths[y], self.widths[x], kernel=1)
        return self._step(
            lambda m, s: m.layers[n](s[y]) + F.interpolate(s[x], size=s[y].shape[2:], mode=mode),
            self.widths[x], self.scales[y], f"{len(self.widths)} = upsample({x},{y})",
        )  # fmt: skip

    def _focus(self, x):
        if self.scales[x] >= 2 or self.widths[x] > 8:
            return x

        def run(m, s):
            y = s[x]
            y = F.pad(y, (0, y.shape[3] % 2, 0, y.shape[2] % 2))
            return torch.cat([y[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)

        return self._step(
            run, 4 * self.widths[x], self.scales[x] + 1, f"{len(self.widths)} = focus({x})"
        )

    def _c2f(self, x):
        y = self._conv(x, 8)
        inner = self._conv_only(4, 4)

        def run(m, s):
            parts = list(s[y].split(4, 1) if fixed else s[y].chunk(2, 1))
            parts.append(m.layers[inner](parts[-1]))
            return torch.cat(parts, 1)

        fixed = self.rng.random() < 0.5
        return self._step(run, 12, self.scales[x], f"{len(self.widths)} = c2f({y})")

    def _group_norm(self, x):
        c = self.widths[x]
        n = self._layer(nn.GroupNorm(2 if c % 2 == 0 else 1, c))
        return self._step(
            lambda m, s: m.layers[n](s[x]), c, self.scales[x], f"{len(self.widths)} = gn({x})"
        )

    def _attention(self, x):
        q, k, v = (self._conv_only(self.widths[x], 4) for _ in range(3))

        def run(m, s):
            a, b, c = (m.layers[i](s[x]).flatten(2) for i in (q, k, v))
            y = (a.transpose(1, 2) @ b).softmax(2) @ c.transpose(1, 2)
            return y.transpose(1, 2).reshape(len(y), 4, *s[x].shape[2:])

        return self._step(run, 4, self.scales[x], f"{len(self.widths)} = attention({x})")

    def _transposed(self, x):
        if not self.scales[x]:
            return x
        c = self.widths[x]
        n = self._layer(
            nn.Sequential(
                nn.ConvTranspose2d(c, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
            )
        )
        return self._step(
            lambda m, s: m.layers[n](s[x]), 8, self.scales[x], f"{len(self.widths)} = up({x})"
        )

    def _shufflenet(self, x):
        c = self.widths[x]
        if c % 4:
            return x
        branch = self._layer(
            nn.Sequential(
                self._conv_layer(c // 2, 8, 1),
                self._conv_layer(8, 8, 3, groups=8, act=False),
                self._conv_layer(8, c // 2, 1),
            )
        )

        def run(m, s):
            left, right = s[x].chunk(2, 1)
            return F.channel_shuffle(torch.cat([left, m.layers[branch](right)], 1), 2)

        return self._step(run, c, self.scales[x], f"{len(self.widths)} = shufflenet({x})")

    def _instance(self, x):
        n = self._layer(
            nn.Sequential(
                nn.Conv2d(self.widths[x], 8, 3, padding=1),
                nn.InstanceNorm2d(8, affine=True),
                nn.ReLU(),
            )
        )
        return self._step(
            lambda m, s: m.layers[n](s[x]), 8, self.scales[x], f"{len(self.widths)} = inorm({x})"
        )

    def _shift(self, x):
        """As TSM: some channels of the sample before."""
        c, fold = self.widths[x], self.widths[x] // 4

        def run(m, s):
            y = torch.zeros_like(s[x])
            y[1:, :fold] = s[x][:-1, :fold]
            y[:, fold:] = s[x][:, fold:]
            return y

        return self._step(run, c, self.scales[x], f"{len(self.widths)} = shift({x})")

    def _mean(self, x):
        return self._step(
            lambda m, s: s[x] - s[x].mean(1, keepdim=True), self.widths[x], self.scales[x],
            f"{len(self.widths)} = centred({x})",
        )  # fmt: skip

    def _padded_in_forward(self, x):
        """As mmcv's Conv2dAdaptivePadding: how much depends on the size."""
        n = self._layer(nn.Conv2d(self.widths[x], 8, 2, stride=2))
        norm = self._layer(nn.BatchNorm2d(8))

        def run(m, s):
            y = s[x]
            y = F.pad(y, (0, y.shape[3] % 2, 0, y.shape[2] % 2))
            return F.relu(m.layers[norm](m.layers[n](y)))

        if self.scales[x] >= 2:
            return x
        return self._step(
            run, 8, self.scales[x] + 1, f"{len(self.widths)} = padded_in_forward({x})"
        )

    def _relu_minus(self, x):
        return self._step(
            lambda m, s: F.relu(s[x] - 1), self.widths[x], self.scales[x],
            f"{len(self.widths)} = relu({x}-1)",
        )  # fmt: skip

    def _ibn(self, x):
        """Half of the channels by InstanceNorm, the others by BatchNorm, as in IBN-Net."""
        n = self._layer(nn.Conv2d(self.widths[x], 8, 3, padding=1))
        norms = [
            self._layer(norm) for norm in (nn.InstanceNorm2d(4, affine=True), nn.BatchNorm2d(4))
        ]

        def run(m, s):
            parts = torch.split(m.layers[n](s[x]), 4, 1)
            found = [m.layers[i](part) for i, part in zip(norms, parts, strict=True)]
            return F.relu(torch.cat(found, 1))

        return self._step(run, 8, self.scales[x], f"{len(self.widths)} = ibn({x})")

    def _softmax(self, x):
        return self._step(
            lambda m, s: s[x].softmax(1), self.widths[x], self.scales[x],
            f"{len(self.widths)} = softmax({x})",
        )  # fmt: skip

    def _bilinear(self, x):
        """Each position times the products of all pairs of channels."""

        def run(m, s):
            y = s[x].flatten(2)
            pooled = y @ y.transpose(1, 2) / y.shape[2]
            return (pooled @ y).reshape(s[x].shape)

        return self._step(
            run, self.widths[x], self.scales[x], f"{len(self.widths)} = bilinear({x})"
        )

    def _max_over_channels(self, x):
        c = self.widths[x]
        if c < 8:
            return x
        pool = self._layer(nn.MaxPool3d((2, 1, 1)))
        return self._step(
            lambda m, s: m.layers[pool](s[x].unsqueeze(1)).squeeze(1), c // 2, self.scales[x],
            f"{len(self.widths)} = max_over_channels({x})",
        )  # fmt: skip

    def _prelu(self, x):
        n = self._layer(nn.PReLU(self.widths[x]))
        return self._step(
            lambda m, s: m.layers[n](s[x]), self.widths[x], self.scales[x],
            f"{len(self.widths)} = prelu({x})",
        )  # fmt: skip

    def _finish(self):
        self.outputs = []
        for _ in range(self.rng.choice([1, 1, 2, 3])):
            x = self._any()
            c = self.widths[x]
            kind = self.rng.choice(["conv", "linear", "flatten", "raw"])
            if kind == "raw":
                self.outputs.append((kind, x, None))
            elif kind == "conv":
                self.outputs.append((kind, x, self._layer(nn.Conv2d(c, 3, 1))))
            else:
                size = 1 if kind == "linear" else 4
                self.outputs.append((kind, x, self._layer(nn.Linear(c * size, 5))))
        self.training_head = None
        if self.rng.random() < 0.15:
            x = self._any()
            head = nn.Sequential(self._conv_layer(self.widths[x], 4), nn.Conv2d(4, 2, 1))
            self.training_head = x, self._layer(head)
        with torch.no_grad():
            read = self.eval()._run((torch.zeros(1, 3, 16, 16),))[1]
        for x in sorted(set(range(len(self.widths))) - read):
            self.outputs.append(("conv", x, self._layer(nn.Conv2d(self.widths[x], 3, 1))))

    def forward(self, *inputs):
        found, _ = self._run(inputs)
        return found if len(found) > 1 else found[0]

    def _run(self, inputs):
        """Outputs, and the indices of the streams that were read."""
        if len(inputs) == 1 and self.two:
            inputs = (inputs[0], inputs[0][:, :2] * 0.5)
        streams = _Streams(inputs)
        for step in self.program:
            streams.append(step(self, streams))
        found = []
        for kind, x, layer in self.outputs:
            y = streams[x]
            if kind == "conv":
                y = self.layers[layer](y)
            elif kind != "raw":
                y = F.adaptive_avg_pool2d(y, 1 if kind == "linear" else 2)
                y = self.layers[layer](y.flatten(1))
            found.append(y)
        if self.training and self.training_head is not None:
            x, layer = self.training_head
            found.append(self.layers[layer](streams[x]))
        return found, streams.read

    # Killing -------------------------------------------------------------------------

    @torch.no_grad()
    def kill(self):
        """Some filters of each layer, the same ones in many layers: dead and constant ones."""
        alike = {}
        share = self.rng.choice([0.2, 0.5, 0.7])
        for module in self.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)) and module.affine:
                c = module.num_features
                if c not in alike or self.rng.random() < 0.4:
                    alike[c] = [i for i in range(c) if self.rng.random() < share]
                for i in alike[c]:
                    module.weight[i] = 0
                    module.bias[i] = self.rng.choice(
                        [-0.5, -0.5, -2.0, -40.0, 0.0, 0.0, 0.3, 1.5, -0.95]
                    )
