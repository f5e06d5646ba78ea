"""strip on mmdet's detectors, narrow and with filters killed at random in every BN layer."""

import re
from collections import defaultdict

import pytest
import torch

from psbn_mmdet.collapse import strip
from psbn_mmdet.collapse.calls import difference, ways_to_compare
from tests.helpers.strippable import detector, kill_at_random

SIZE = (3, 64, 64)
BACKBONE = {"backbone.base_channels": 8, "backbone.init_cfg": None, "neck.out_channels": 16}
R50 = {**BACKBONE, "neck.in_channels": [32, 64, 128, 256]}
R18 = {**BACKBONE, "backbone.depth": 18, "neck.in_channels": [8, 16, 32, 64]}
HEAD = {"bbox_head.in_channels": 16, "bbox_head.feat_channels": 16, "bbox_head.num_classes": 3}
ROI_HEAD = {
    "roi_head.bbox_roi_extractor.out_channels": 16,
    "roi_head.bbox_head.in_channels": 16,
    "roi_head.bbox_head.fc_out_channels": 32,
    "roi_head.bbox_head.num_classes": 3,
}
YOLOX = {
    "backbone.widen_factor": 0.125,
    "neck.in_channels": [32, 64, 128],
    "neck.out_channels": 32,
    "bbox_head.in_channels": 32,
    "bbox_head.feat_channels": 32,
}
DETECTORS = {
    "retinanet/retinanet_r50_fpn_1x_coco.py": {
        **R50,
        **HEAD,
        "bbox_head.norm_cfg": {"type": "BN"},
    },
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py": {
        **R18,
        "rpn_head.in_channels": 16,
        "rpn_head.feat_channels": 16,
        **ROI_HEAD,
    },
    "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py": {**R18, **HEAD, "bbox_head.feat_channels": 32},
    "yolox/yolox_tiny_8xb8-300e_coco.py": YOLOX,
}
# Layers whose outputs are added up: a channel goes if it was killed in all of them.
SUMS = [
    r"(backbone\.layer\d)\.(\d\.bn3|0\.downsample\.1)",  # ResNet-50
    r"(backbone\.layer\d)\.(\d\.bn2|0\.downsample\.1)",  # ResNet-18
    r"(backbone\.stage[123]\.1)\.(main_conv|blocks\.\d\.conv2)\.bn",  # CSPDarknet
]


def expected_to_go(killed, bottleneck):
    """Layer -> filters, from what was killed and which layers are added up."""
    sums = defaultdict(list)
    for name in killed:
        for pattern in SUMS[:1] if bottleneck else SUMS[1:]:
            if found := re.fullmatch(pattern, name):
                sums[found[1]].append(name)
                break
    gone = dict(killed)
    for names in sums.values():
        common = set.intersection(*(set(killed[name]) for name in names))
        gone.update({name: sorted(common) for name in names})
    # The first block of ResNet-18 adds its input, of the stem, to its output.
    if "backbone.layer1.0.bn2" in killed and "backbone.layer1.0.downsample.1" not in killed:
        names = ["backbone.bn1", "backbone.layer1.0.bn2", "backbone.layer1.1.bn2"]
        common = set.intersection(*(set(killed[name]) for name in names))
        gone.update({name: sorted(common) for name in names})
    return {name: each for name, each in gone.items() if each}


@pytest.mark.slow
@pytest.mark.parametrize("config", DETECTORS)
def test_exact_and_what_goes_is_what_was_killed_and_could_go(config):
    model = detector(config, **DETECTORS[config])
    yolox = config.startswith("yolox")
    killed = kill_at_random(model, 0.5, bias=0.0 if yolox else -0.5)  # SiLU passes a negative one
    stripped = strip(model, SIZE)
    removed = {
        name: sorted(i for kind, each in kinds.items() if kind != "unread" for i in each)
        for name, kinds in stripped.record["removed"].items()
    }
    assert removed == expected_to_go(
        killed, bottleneck="r50_fpn_1x" in config and "retina" in config
    )
    assert stripped.record["proof"]["largest_relative_difference"] < 1e-5
    images = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(7))
    run = ways_to_compare(model, images)[0]
    assert difference(model, stripped.model, run).relative < 1e-5
    macs = stripped.record["macs"]
    assert macs["after"] < macs["before"]
