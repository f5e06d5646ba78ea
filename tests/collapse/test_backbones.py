"""strip and revive on backbones of mmdet that normalize by BN, with 30% of the filters killed.

Three small ones; `PSBN_TEST_BACKBONES=1 pytest -s -m slow tests/collapse/test_backbones.py` takes
all, which is minutes, and prints the table of docs/collapse.md.
"""

import copy
import os

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from psbn_mmdet.collapse import norm_modules, revive, strip
from psbn_mmdet.collapse.calls import compare
from tests.helpers.strippable import kill_at_random

pytestmark = pytest.mark.slow

BACKBONES = {
    "ResNet-18": dict(type="ResNet", depth=18),
    "ResNet-50": dict(type="ResNet", depth=50),
    "ResNetV1d-50": dict(type="ResNetV1d", depth=50),
    "ResNeXt-50 32x4d": dict(type="ResNeXt", depth=50, groups=32, base_width=4),
    "Res2Net-50": dict(type="Res2Net", depth=50, scales=4, base_width=26),
    "ResNeSt-50": dict(type="ResNeSt", depth=50, stem_channels=64, radix=2, reduction_factor=4),
    "RegNetX-400MF": dict(type="RegNet", arch="regnetx_400mf"),
    "HRNet-W18": dict(
        type="HRNet",
        extra=dict(
            stage1=dict(
                num_modules=1,
                num_branches=1,
                block="BOTTLENECK",
                num_blocks=(4,),
                num_channels=(64,),
            ),
            **{
                f"stage{i}": dict(
                    num_modules=1,  # of 1, 4, 3 alike ones
                    num_branches=i,
                    block="BASIC",
                    num_blocks=(2,) * i,
                    num_channels=tuple(18 * 2**k for k in range(i)),
                )
                for i in (2, 3, 4)
            },
        ),
    ),
    "Hourglass-52": dict(type="HourglassNet", num_stacks=1),
    "MobileNetV2": dict(type="MobileNetV2"),
    "EfficientNet-B0": dict(type="EfficientNet", arch="b0"),
    "Darknet-53": dict(type="Darknet"),
    "CSPDarknet-S": dict(type="CSPDarknet", deepen_factor=0.33, widen_factor=0.5),
    "CSPDarknet-S, ReLU": dict(
        type="CSPDarknet", deepen_factor=0.33, widen_factor=0.5, act_cfg=dict(type="ReLU")
    ),
    "CSPNeXt-S": dict(type="CSPNeXt", deepen_factor=0.33, widen_factor=0.5),
    "TridentResNet-50": dict(
        type="TridentResNet",
        depth=50,
        num_branch=3,
        test_branch_idx=1,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        trident_dilations=(1, 2, 3),
        out_indices=(2,),
        num_stages=3,
    ),
    "DetectoRS ResNet-50": dict(
        type="DetectoRS_ResNet",
        depth=50,
        conv_cfg=dict(type="ConvAWS"),
        sac=dict(type="SAC", use_deform=False),
        stage_with_sac=(False, True, True, True),
        output_img=True,
    ),
}


def build(cfg):
    from mmdet.utils import register_all_modules
    from mmengine.registry import MODELS

    register_all_modules()
    torch.manual_seed(0)
    net = MODELS.build(copy.deepcopy(cfg))
    net.train()  # which returns nothing for some
    generator = torch.Generator().manual_seed(1)
    for norm in norm_modules(net).values():  # not as zero_init_residual starts
        norm.weight.data = torch.rand(norm.weight.shape, generator=generator) + 0.5
        norm.bias.data = torch.randn(norm.bias.shape, generator=generator) * 0.3
        norm.requires_grad_()
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = None
            module.reset_running_stats()
            module.train()  # also where norm_eval keeps it out of training
    with torch.no_grad():
        net(torch.randn(8, 3, 96, 96, generator=generator))
    net.eval()
    return net


SMALL = ("HRNet-W18", "CSPDarknet-S, ReLU", "CSPDarknet-S")


@pytest.mark.parametrize("name", BACKBONES if "PSBN_TEST_BACKBONES" in os.environ else SMALL)
def test_a_backbone_of_mmdet(name):
    net = build(BACKBONES[name])
    killed = sum(map(len, kill_at_random(net, 0.3, bias=-0.5).values()))
    images = torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    other = torch.randn(2, 3, 128, 64, generator=torch.Generator().manual_seed(3)).double()
    stripped = strip(net, images[:2])
    record, proof = stripped.record, stripped.record["proof"]
    revived = copy.deepcopy(net)
    given = revive(revived, images)
    with torch.no_grad():
        outputs = [copy.deepcopy(m).double()(other) for m in (net, stripped.model, revived)]
    for new in outputs[1:]:
        # Written in float32.
        assert compare(list(outputs[0]), list(new)).relative < 1e-4
    filters, again = record["filters"], given["filters"]
    gone = filters["dead"] + filters["constant"]
    why = "; ".join(
        f"{sum(len(c) for c in layers.values())} {reason}"
        for reason, layers in given["left"].items()
    )
    cells = [name, killed, gone, filters["unread"], again["revived"], why]
    print("|", " | ".join(map(str, cells)), "|", proof["of_the_surgery_alone"], given["proof"])
    assert gone + filters["kept"] == killed == again["revived"] + again["left"]
