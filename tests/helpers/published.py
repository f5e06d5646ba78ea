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


def _conv(inputs, filters, kernel, stride=1, dilation=1, groups=1):
    """Padded so that the plane stays, without a bias."""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = [(k - 1) // 2 * dilation for k in kernel]
    return nn.Conv2d(inputs, filters, kernel, stride, padding, dilation, groups, bias=False)


class _Pair(nn.Module):
    """YuNet's pointwise convolution with a depthwise one behind it."""

    def __init__(self, inputs, filters, norm=True):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, filters, 1)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, groups=filters)
        if norm:
            self.bn = nn.BatchNorm2d(filters)

    def forward(self, x):
        x = self.conv2(self.conv1(x))
        return F.relu(self.bn(x)) if hasattr(self, "bn") else x


class _YuNetStem(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.conv2 = _Pair(16, 16)

    def forward(self, x):
        return self.conv2(F.relu(self.bn1(self.conv1(x))))


class _YuNetStage(nn.Module):
    def __init__(self, inputs, filters):
        super().__init__()
        self.conv1, self.conv2 = _Pair(inputs, inputs), _Pair(inputs, filters)

    def forward(self, x):
        return self.conv2(self.conv1(x))


class YuNet(nn.Module):
    """A face detector: six stages, a pyramid whose levels are added, heads without norm layers."""

    def __init__(self):
        super().__init__()
        self.backbone, self.neck, self.bbox_head = nn.Module(), nn.Module(), nn.Module()
        self.backbone.model0 = _YuNetStem()
        for i, sizes in enumerate([(16, 32), (32, 64), (64, 64), (64, 64), (64, 64)], 1):
            self.backbone.add_module(f"model{i}", _YuNetStage(*sizes))
        self.neck.lateral_convs = nn.ModuleList(_Pair(64, 64) for _ in range(3))
        for name, n in {"cls": 1, "bbox": 4, "obj": 1, "kps": 10}.items():
            heads = nn.ModuleList(_Pair(64, n, norm=False) for _ in range(3))
            self.bbox_head.add_module(f"multi_level_{name}", heads)

    def forward(self, x):
        levels = []
        for i in range(6):
            x = getattr(self.backbone, f"model{i}")(x)
            if i >= 3:
                levels.append(x)
            if i in (0, 2, 3, 4):
                x = F.max_pool2d(x, 2)
        for i in (2, 1, 0):
            levels[i] = self.neck.lateral_convs[i](levels[i])
            if i:
                levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], scale_factor=2.0)
        heads = self.bbox_head.children()
        return [head(y) for level in heads for head, y in zip(level, levels, strict=True)]


class _Shuffled(nn.Module):
    """A unit of ShuffleNetV2."""

    def __init__(self, channels, stride):
        super().__init__()
        c, self.stride = channels, stride
        self.branch_main = nn.Sequential(
            _conv(c, c, 1), nn.BatchNorm2d(c), nn.ReLU(),
            _conv(c, c, 3, stride, groups=c), nn.BatchNorm2d(c),
            _conv(c, c, 1), nn.BatchNorm2d(c), nn.ReLU(),
        )  # fmt: skip
        if stride == 2:
            self.branch_proj = nn.Sequential(
                _conv(c, c, 3, 2, groups=c), nn.BatchNorm2d(c),
                _conv(c, c, 1), nn.BatchNorm2d(c), nn.ReLU(),
            )  # fmt: skip

    def forward(self, x):
        if self.stride == 2:
            return torch.cat([self.branch_proj(x), self.branch_main(x)], 1)
        even, odd = x[:, 0::2], x[:, 1::2]
        return torch.cat([even, self.branch_main(odd)], 1)


def _cbr(inputs, filters, kernel, groups=1):
    norm = nn.BatchNorm2d(filters)
    return [_conv(inputs, filters, kernel, groups=groups), norm, nn.ReLU()]


class _Named(nn.Module):
    def __init__(self, name, *layers):
        super().__init__()
        self.add_module(name, nn.Sequential(*layers))

    def forward(self, x):
        (layers,) = self.children()
        return layers(x)


class FastestDet(nn.Module):
    """A detector of COCO on ShuffleNetV2: three levels joined, pooled at three sizes, one head."""

    def __init__(self):
        super().__init__()
        self.backbone, self.SPP, self.detect_head = nn.Module(), nn.Module(), nn.Module()
        stem = _conv(3, 24, 3, 2)
        self.backbone.first_conv = nn.Sequential(stem, nn.BatchNorm2d(24), nn.ReLU())
        for name, channels, n in (("stage2", 24, 4), ("stage3", 48, 8), ("stage4", 96, 4)):
            units = [_Shuffled(channels, 2 if i == 0 else 1) for i in range(n)]
            self.backbone.add_module(name, nn.Sequential(*units))
        self.SPP.Conv1x1 = _Named("conv1x1", *_cbr(336, 96, 1))
        for i in (1, 2, 3):
            layers = [layer for _ in range(i) for layer in _cbr(96, 96, 5, groups=96)]
            self.SPP.add_module(f"S{i}", nn.Sequential(*layers))
        self.SPP.output = nn.Sequential(_conv(288, 96, 1), nn.BatchNorm2d(96))
        self.detect_head.conv1x1 = _Named("conv1x1", *_cbr(96, 96, 1))
        for name, n in (("obj", 1), ("reg", 4), ("cls", 80)):
            layers = [*_cbr(96, 96, 5, groups=96), _conv(96, n, 1), nn.BatchNorm2d(n)]
            self.detect_head.add_module(f"{name}_layers", _Named("conv5x5", *layers))

    def forward(self, x):
        net, spp, head = self.backbone, self.SPP, self.detect_head
        x = F.max_pool2d(net.first_conv(x), 3, 2, 1)
        a = net.stage2(x)
        b = net.stage3(a)
        c = net.stage4(b)
        a, c = F.avg_pool2d(a, 3, 2, 1), F.interpolate(c, scale_factor=2.0)
        x = spp.Conv1x1(torch.cat([a, b, c], 1))
        x = F.relu(x + spp.output(torch.cat([spp.S1(x), spp.S2(x), spp.S3(x)], 1)))
        x = head.conv1x1(x)
        found = head.obj_layers(x).sigmoid(), head.reg_layers(x), head.cls_layers(x).softmax(1)
        return torch.cat(found, 1)


class _NormPReLU(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(channels, eps=1e-3), nn.PReLU(channels)

    def forward(self, x):
        return self.act(self.bn(x))


class _ConvNormPReLU(_NormPReLU):
    def __init__(self, inputs, channels, stride):
        super().__init__(channels)
        self.conv = _conv(inputs, channels, 3, stride)

    def forward(self, x):
        return super().forward(self.conv(x))


class _Branches(nn.Module):
    """A narrow convolution, then branches beside one another, joined; a residual where it fits.

    Args:
        first: Of the convolution in front: inputs, filters, kernel, stride.
        branches: Name -> module with a ``conv``.
        channels: Of the branches together.
        own_norm: Whether norm and activation stand here by themselves.
        sums: Whether each branch from the second on is added to the next one.
    """

    def __init__(self, first, branches, channels, own_norm, sums):
        super().__init__()
        self.c1 = _wrapped(_conv(*first))
        for name, branch in branches.items():
            self.add_module(name, branch)
        self.names, self.sums, self.own_norm = list(branches), sums, own_norm
        self.residual = first[0] == channels
        if own_norm:
            self.bn, self.act = nn.BatchNorm2d(channels, eps=1e-3), nn.PReLU(channels)
        else:
            self.bn = _NormPReLU(channels)

    def forward(self, x):
        y = self.c1.conv(x)
        found = [getattr(self, name).conv(y) for name in self.names]
        for i in range(2, len(found)) if self.sums else ():
            found[i] = found[i] + found[i - 1]
        y = torch.cat(found, 1)
        y = self.bn(y + x if self.residual else y)
        return self.act(y) if self.own_norm else y


def _wrapped(conv):
    module = nn.Module()
    module.conv = conv
    return module


def _esp(inputs, channels, stride):
    n = channels // 5
    dilations = {"d1": 1, "d2": 2, "d4": 4, "d8": 8, "d16": 16}
    branches = {
        name: _wrapped(_conv(n, channels - 4 * n if d == 1 else n, 3, dilation=d))
        for name, d in dilations.items()
    }
    first = (inputs, n, 3 if stride == 2 else 1, stride)
    return _Branches(first, branches, channels, own_norm=stride == 2, sums=True)


class ESPNetEncoder(nn.Module):
    """ESPNet-C (Mehta et al. 2018): dilated convolutions whose outputs are summed, then joined."""

    def __init__(self):
        super().__init__()
        self.level1, self.b1 = _ConvNormPReLU(3, 16, 2), _NormPReLU(19)
        self.level2_0 = _esp(19, 64, 2)
        self.level2 = nn.ModuleList(_esp(64, 64, 1) for _ in range(2))
        self.b2 = _NormPReLU(131)
        self.level3_0 = _esp(131, 128, 2)
        self.level3 = nn.ModuleList(_esp(128, 128, 1) for _ in range(3))
        self.b3 = _NormPReLU(256)
        self.classifier = _wrapped(nn.Conv2d(256, 20, 1, bias=False))

    def forward(self, x):
        half = F.avg_pool2d(x, 3, 2, 1)
        quarter = F.avg_pool2d(half, 3, 2, 1)
        x = self.b1(torch.cat([self.level1(x), half], 1))
        first = x = self.level2_0(x)
        for block in self.level2:
            x = block(x)
        x = self.b2(torch.cat([x, first, quarter], 1))
        first = x = self.level3_0(x)
        for block in self.level3:
            x = block(x)
        return self.classifier.conv(self.b3(torch.cat([first, x], 1)))


def _c3(inputs, channels, n, kernels, stride=1, first_kernel=1, own_norm=False):
    branches = {}
    for i, kernel in enumerate(kernels, 1):
        filters = channels - n * (len(kernels) - 1) if i == 1 else n
        dilated = [_conv(n, n, 3, dilation=(kernel + 1) // 2, groups=n), _conv(n, filters, 1)]
        long = []
        for k in ((kernel, 1), (1, kernel)) if kernel > 1 else ():
            long += [_conv(n, n, k, groups=n), nn.BatchNorm2d(n), nn.PReLU(n)]
        branches[f"d{i}"] = _wrapped(nn.Sequential(*long[:5], *dilated))
    first = (inputs, n, first_kernel, stride)
    return _Branches(first, branches, channels, own_norm, sums=False)


class ExtremeC3(nn.Module):
    """ExtremeC3Net (Park et al. 2019): depthwise and dilated branches, and a shallow fine path."""

    def __init__(self):
        super().__init__()
        e = self.encoder = nn.Module()
        e.level1, e.b1 = _ConvNormPReLU(3, 24, 2), _NormPReLU(27)
        e.level2_0 = _c3(27, 48, 16, (1, 3, 5), 2, 3, own_norm=True)
        e.level2 = nn.ModuleList([_c3(48, 48, 16, (1, 5, 7))])
        e.b2 = _NormPReLU(99)
        e.level3_0 = _c3(99, 56, 18, (1, 5, 9))
        e.level3 = nn.ModuleList(_c3(56, 56, 18, (3, 7, 15)) for _ in range(5))
        e.b3 = _NormPReLU(112)
        self.upsample = nn.Sequential(nn.Conv2d(112, 24, 1, bias=False), nn.BatchNorm2d(24))
        stem = _wrapped(_conv(3, 24, 3, 2))
        self.Fine = nn.ModuleList([stem, _c3(24, 24, 8, (3, 7, 15))])
        last = nn.Conv2d(24, 1, 1, bias=False)
        self.classifier = nn.Sequential(_NormPReLU(24), nn.Upsample(scale_factor=2.0), last)

    def forward(self, x):
        e = self.encoder
        half = F.avg_pool2d(x, 3, 2, 1)
        quarter = F.avg_pool2d(half, 3, 2, 1)
        y = e.b1(torch.cat([e.level1(x), half], 1))
        first = y = e.level2_0(y)
        for block in e.level2:
            y = block(y)
        y = e.b2(torch.cat([first, y, quarter], 1))
        first = y = e.level3_0(y)
        for block in e.level3:
            y = block(y)
        y = self.upsample(e.b3(torch.cat([first, y], 1)))
        fine = self.Fine[1](self.Fine[0].conv(x))
        return self.classifier(F.interpolate(y, scale_factor=2.0) + fine)


PUBLISHED = {
    "akamaster_resnet20-12fca82f.th": (CifarResNet20, (3, 32, 32)),
    "3ddfa_mb05.pth": (FaceMobileNet, (3, 120, 120)),
    "lprnet.pth": (PlateNet, (3, 24, 94)),
    "ultralight_slim-320.pth": (SlimFaceNet, (3, 120, 160)),
    "yunet_s.pth": (YuNet, (3, 96, 96)),
    "fastestdet_coco.pth": (FastestDet, (3, 96, 96)),
    "espnet_enc_q3.pth": (ESPNetEncoder, (3, 64, 64)),
    "extremec3.pth": (ExtremeC3, (3, 64, 64)),
}
