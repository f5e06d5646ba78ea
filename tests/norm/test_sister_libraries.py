"""Networks of other libraries built on mmengine take psBN; runs where each is installed."""

from importlib import import_module

import pytest
import torch
from torch.testing import assert_close

from psbn_mmdet import psBN2d

NETWORKS = {
    "mmseg": dict(type="ResNet", depth=50),
    "mmpose": dict(type="ResNet", depth=50),
    "mmaction": dict(type="ResNet", depth=50),
    "mmyolo": dict(type="YOLOXCSPDarknet", deepen_factor=0.33, widen_factor=0.25),
    "mmdet3d": dict(
        type="SECOND", in_channels=3, out_channels=[8, 8], layer_nums=[1, 1], layer_strides=[2, 2]
    ),
}


@pytest.mark.parametrize("library", NETWORKS)
def test_builds_loads_bn_computes_the_same_and_trains(library):
    pytest.importorskip(library)
    pytest.importorskip(f"{library}.models", exc_type=ImportError)  # some lack what they import
    models = import_module(f"{library}.registry").MODELS
    bn, psbn = (
        models.build({**NETWORKS[library], "norm_cfg": dict(type=norm, eps=1e-5, momentum=0.1)})
        for norm in ("BN", "psBN")
    )
    assert any(isinstance(module, psBN2d) for module in psbn.modules())
    psbn.load_state_dict(bn.state_dict())
    bn.eval()
    psbn.eval()
    x = torch.randn(2, 3, 32, 32)
    assert_close(psbn(x), bn(x))
    betas = {name: p.clone() for name, p in psbn.named_parameters() if name.endswith("beta")}
    optimizer = torch.optim.SGD(psbn.parameters(), lr=0.1)
    psbn.train()
    outputs = psbn(x)
    sum(y.sum() for y in ([outputs] if torch.is_tensor(outputs) else outputs)).backward()
    optimizer.step()
    assert any(not torch.equal(dict(psbn.named_parameters())[name], b) for name, b in betas.items())
