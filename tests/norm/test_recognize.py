"""What counts as a normalization layer, by module and by the keys of a state dict; rebasing."""

import random
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from psbn_mmdet import psBN1d, psBN2d, psBN3d, psIN1d, psIN2d, psIN3d, psSyncBN, to_psbn
from psbn_mmdet.norm import added_bias, alpha_of, is_norm_layer, norm_kinds, norm_layers, rebase


class Own(nn.BatchNorm2d):
    pass


PLAIN = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, Own]
INSTANCE = [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d]
SHIFTED = [psBN1d, psBN2d, psBN3d, psIN1d, psIN2d, psIN3d, psSyncBN]
OTHERS = [
    lambda: nn.GroupNorm(2, 4),
    lambda: nn.LayerNorm(4),
    lambda: nn.Conv2d(4, 4, 1),
    lambda: nn.Linear(4, 4),
    lambda: nn.PReLU(4),
    lambda: nn.Sequential(nn.BatchNorm2d(4)),
]


def script(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(module)


class TestModules:
    @pytest.mark.parametrize("kind", [*PLAIN, *INSTANCE, *SHIFTED])
    def test_every_kind_of_batch_and_instance_norm(self, kind):
        assert is_norm_layer(kind(4))
        assert is_norm_layer(kind(4, affine=True, track_running_stats=False))

    @pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d, psBN2d, psIN2d])
    def test_scripted(self, kind):
        assert is_norm_layer(script(kind(4, affine=True).eval()))

    def test_lazy_and_not_affine(self):
        assert is_norm_layer(nn.LazyBatchNorm2d())
        assert is_norm_layer(nn.BatchNorm2d(4, affine=False))

    def test_frozen_and_exported_ones_by_their_tensors(self):
        from mmdet.models.layers.brick_wrappers import FrozenBatchNorm2d

        assert is_norm_layer(FrozenBatchNorm2d(4))
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
        exported = torch.export.export(model, (torch.randn(2, 3, 4, 4),)).module()
        assert list(norm_layers(exported)) == ["1"]

    @pytest.mark.parametrize("make", OTHERS)
    def test_nothing_else(self, make):
        assert not is_norm_layer(make())
        assert not is_norm_layer(script(make()))

    def test_by_name_and_each_once(self):
        shared = nn.BatchNorm2d(4)
        model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.ReLU(), psBN2d(4)), "c": shared})
        assert norm_layers(model) == {"a": shared, "b.1": model["b"][1]}
        assert list(norm_layers(shared)) == [""]

    def test_to_psbn_refuses_what_is_one_and_has_no_twin_but_leaves_the_frozen(self):
        from mmdet.models.layers.brick_wrappers import FrozenBatchNorm2d

        class Foreign(nn.Module):  # as mmcv's SyncBatchNorm, which is no _BatchNorm
            def __init__(self):
                super().__init__()
                self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
                self.register_buffer("running_mean", torch.zeros(4))
                self.register_buffer("running_var", torch.ones(4))

        with pytest.raises(TypeError, match="1 is a Foreign"):
            to_psbn(nn.Sequential(nn.BatchNorm2d(4), Foreign()))
        with pytest.warns(UserWarning, match="no ReLU follows any of the 1 layers"):
            model = to_psbn(nn.Sequential(nn.BatchNorm2d(4), FrozenBatchNorm2d(4)))
        assert [type(m) for m in model] == [psBN2d, FrozenBatchNorm2d]


class TestStateDicts:
    @pytest.mark.parametrize("seed", range(5))
    def test_of_a_model_in_any_order_of_keys(self, seed):
        model = nn.Sequential(
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
            nn.Sequential(psBN2d(4), psIN2d(4)),
            nn.InstanceNorm2d(4, affine=True),
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            nn.GroupNorm(2, 4),
            nn.LayerNorm(4),
            nn.BatchNorm2d(4, affine=False),
            nn.PReLU(4),
            nn.Linear(4, 1),
        )
        items = list(model.state_dict().items())
        random.Random(seed).shuffle(items)
        assert norm_kinds(dict(items)) == {
            "1": "bn",
            "2.0": "psbn",
            "2.1": "psbn",
            "3": "unknown",
            "4": "bn",
            "5": "unknown",
            "6": "unknown",
        }

    @pytest.mark.parametrize(("kind", "name"), [(nn.BatchNorm2d, "bn"), (psSyncBN, "psbn")])
    def test_of_a_single_layer(self, kind, name):
        assert norm_kinds(kind(4).state_dict()) == {"": name}

    @pytest.mark.parametrize(
        "change",
        [
            lambda state: state.pop("alpha"),
            lambda state: state.update(bias=torch.zeros(3)),
            lambda state: state.update(alpha=torch.zeros(4)),
        ],
    )
    def test_contradictory_psbn_is_unknown(self, change):
        state = psBN2d(4).state_dict()
        change(state)
        assert norm_kinds(state) == {"": "unknown"}

    def test_contradictory_bn_is_unknown(self):
        state = nn.BatchNorm2d(4).state_dict()
        assert norm_kinds({**state, "alpha": torch.tensor(0.1)}) == {"": "unknown"}
        assert norm_kinds({**state, "running_mean": torch.zeros(3)}) == {"": "unknown"}

    def test_values_that_are_no_tensors_are_passed_over(self):
        assert norm_kinds({"weight": None, "epoch": 3}) == {}


def test_alpha_is_what_the_layer_adds_whatever_an_average_made_of_the_buffer():
    layer = psBN2d(4, alpha=0.3)
    layer.alpha.fill_(0.7)
    assert alpha_of(layer) == 0.3
    assert torch.equal(added_bias(layer), layer.beta.detach() + 0.3)
    assert alpha_of(nn.BatchNorm2d(4)) is None


class TestRebase:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    def test_keeps_the_sum(self, dtype):
        beta = torch.randn(1000).to(dtype)
        old, new = torch.tensor(0.3, dtype=dtype), torch.tensor(0.1, dtype=dtype)
        for shift in (old, 0):
            rebased = rebase(beta, shift, new)
            assert rebased.dtype == dtype
            exact = beta.double() + float(shift)
            # two roundings of numbers below 8, each by at most half a unit in the last place
            assert_close(
                rebased.double() + float(new), exact, rtol=0, atol=8 * torch.finfo(dtype).eps
            )

    def test_equal_shifts_keep_the_bits(self):
        beta = torch.randn(1000)
        assert torch.equal(rebase(beta, torch.tensor(0.1), torch.tensor(0.1)), beta)

    def test_in_the_wider_dtype(self):
        beta = torch.randn(1000).half()
        assert torch.equal(rebase(beta, 0, 0.1, torch.float32), beta.float() - 0.1)
        assert rebase(beta.double(), 0, 0.1, torch.float32).dtype == torch.float64
