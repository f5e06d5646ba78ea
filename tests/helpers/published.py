"""Networks that others trained and published, as their checkpoints' names tell them."""

import torch
from torch import nn
from torch.nn import functional as F


def load(model, file, **options):
    """Their weights, without the wrapper's prefix; eval mode."""
    saved = torch.load(file, map_location="cpu", weights_only=True)
    saved = saved.get("state_dict", saved)
    state_dict = {
        k[len("module.") :] if k.startswith("module.") else k: v for k, v in saved.items()
    }
    model.load_state_dict(state_dict, **options)
    return model.eval()


class _Basic(nn.Module):
    def __init__(self, inputs, filters, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, filters, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.stride, self.more = stride, filters - inputs

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:  # option A: no parameters
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return F.relu(x + y)


class CifarResNet20(nn.Module):
    """ResNet-20 with shortcuts of option A, as in He et al. 2016, section 4.2."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        inputs = 16
        for number, filters in enumerate((16, 32, 64), 1):
            blocks = []
            for i in range(3):
                blocks.append(_Basic(inputs, filters, 2 if i == 0 and number > 1 else 1))
                inputs = filters
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class _Separable(nn.Module):
    def __init__(self, inputs, filters, stride):
        super().__init__()
        self.conv_dw = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        self.bn_dw = nn.BatchNorm2d(inputs)
        self.conv_sep = nn.Conv2d(inputs, filters, 1, bias=False)
        self.bn_sep = nn.BatchNorm2d(filters)

    def forward(self, x):
        x = F.relu(self.bn_dw(self.conv_dw(x)))
        return F.relu(self.bn_sep(self.conv_sep(x)))


class FaceMobileNet(nn.Module):
    """MobileNetV1 of half width, with two linear layers on its features."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        blocks = {"dw2_1": (16, 32, 1), "dw2_2": (32, 64, 2), "dw3_1": (64, 64, 1)}
        blocks.update({"dw3_2": (64, 128, 2), "dw4_1": (128, 128, 1), "dw4_2": (128, 256, 2)})
        blocks.update({f"dw5_{i}": (256, 256, 1) for i in range(1, 6)})
        blocks.update({"dw5_6": (256, 512, 2), "dw6": (512, 512, 1)})
        self.blocks = list(blocks)
        for name, sizes in blocks.items():
            self.add_module(name, _Separable(*sizes))
        self.fc_param, self.fc_lm = nn.Linear(512, 62), nn.Linear(512, 136)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.blocks:
            x = getattr(self, name)(x)
        x = x.mean((2, 3))
        return torch.cat([self.fc_param(x), self.fc_lm(x)], 1)


def _small(inputs, filters):
    middle = filters // 4
    return nn.Sequential(
        nn.Conv2d(inputs, middle, 1),
        nn.ReLU(),
        nn.Conv2d(middle, middle, (3, 1), padding=(1, 0)),
        nn.ReLU(),
        nn.Conv2d(middle, middle, (1, 3), padding=(0, 1)),
        nn.ReLU(),
        nn.Conv2d(middle, filters, 1),
    )


class _Small(nn.Module):
    def __init__(self, inputs, filters):
        super().__init__()
        self.block = _small(inputs, filters)

    def forward(self, x):
        return self.block(x)


class PlateNet(nn.Module):
    """LPRNet (Zherzdev and Gruzdev 2018): max pooling over channels, global contexts."""

    def __init__(self, characters=68):
        super().__init__()

        def pool(step):
            return nn.MaxPool3d((1, 3, 3), stride=step)

        self.backbone = nn.Sequential(
            nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), pool((1, 1, 1)),
            _Small(64, 128), nn.BatchNorm2d(128), nn.ReLU(), pool((2, 1, 2)),
            _Small(64, 256), nn.BatchNorm2d(256), nn.ReLU(),
            _Small(256, 256), nn.BatchNorm2d(256), nn.ReLU(), pool((4, 1, 2)), nn.Dropout(),
            nn.Conv2d(64, 256, (1, 4)), nn.BatchNorm2d(256), nn.ReLU(), nn.Dropout(),
            nn.Conv2d(256, characters, (13, 1)), nn.BatchNorm2d(characters), nn.ReLU(),
        )  # fmt: skip
        self.container = nn.Sequential(nn.Conv2d(448 + characters, characters, 1))

    def forward(self, x):
        kept = []
        for number, layer in enumerate(self.backbone):
            x = layer(x)
            if number in (2, 6, 13, 22):
                kept.append(x)
        pools = [(5, (5, 5)), (5, (5, 5)), ((4, 10), (4, 2)), None]
        contexts = []
        for y, size in zip(kept, pools, strict=True):
            y = F.avg_pool2d(y, size[0], size[1]) if size else y
            contexts.append(y / y.pow(2).mean())
        height = min(y.shape[2] for y in contexts)
        width = min(y.shape[3] for y in contexts)
        x = torch.cat([y[:, :, :height, :width] for y in contexts], 1)
        return self.container(x).mean(2)


class SlimFaceNet(nn.Module):
    """Ultra-Light-Fast-Generic-Face-Detector-1MB, slim: an SSD on a narrow MobileNet."""

    def __init__(self):
        super().__init__()

        def first(inputs, filters, stride):
            return nn.Sequential(
                nn.Conv2d(inputs, filters, 3, stride, 1, bias=False),
                nn.BatchNorm2d(filters),
                nn.ReLU(),
            )

        def separable(inputs, filters, stride):
            return nn.Sequential(
                nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
                nn.BatchNorm2d(inputs),
                nn.ReLU(),
                nn.Conv2d(inputs, filters, 1, bias=False),
                nn.BatchNorm2d(filters),
                nn.ReLU(),
            )

        def separable_conv(inputs, filters, stride=1):
            return nn.Sequential(
                nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs),
                nn.ReLU(),
                nn.Conv2d(inputs, filters, 1),
            )

        widths = [16, 32, 32, 32, 64, 64, 64, 64, 128, 128, 128, 256, 256]
        strides = [2, 1, 2, 1, 2, 1, 1, 1, 2, 1, 1, 2, 1]
        layers = [first(3, 16, 2)]
        for i in range(1, 13):
            layers.append(separable(widths[i - 1], widths[i], strides[i]))
        self.base_net = nn.ModuleList(layers)
        extra = [nn.Conv2d(256, 64, 1), nn.ReLU(), separable_conv(64, 256, 2), nn.ReLU()]
        self.extras = nn.ModuleList([nn.Sequential(*extra)])

        def heads(each):
            inputs = [(64, 3), (128, 2), (256, 2)]
            layers = [separable_conv(c, each * boxes) for c, boxes in inputs]
            return nn.ModuleList([*layers, nn.Conv2d(256, 3 * each, 3, padding=1)])

        self.classification_headers, self.regression_headers = heads(2), heads(4)

    def forward(self, x):
        features = []
        for number, layer in enumerate(self.base_net):
            x = layer(x)
            if number in (7, 10, 12):
                features.append(x)
        features.append(self.extras[0](x))
        found = []
        for heads, each in ((self.classification_headers, 2), (self.regression_headers, 4)):
            outputs = [h(y).permute(0, 2, 3, 1) for h, y in zip(heads, features, strict=True)]
            found.append(torch.cat([y.reshape(len(y), -1, each) for y in outputs], 1))
        return found


PUBLISHED = {
    "akamaster_resnet20-12fca82f.th": (CifarResNet20, (3, 32, 32)),
    "3ddfa_mb05.pth": (FaceMobileNet, (3, 120, 120)),
    "lprnet.pth": (PlateNet, (3, 24, 94)),
    "ultralight_slim-320.pth": (SlimFaceNet, (3, 120, 160)),
}
