"""Whoever reads a psBN layer as a BatchNorm gets its function, or an error with the way out."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from psbn_mmdet import psBN2d, psIN, psSyncBN, to_bn, to_psbn
from tests.helpers.layers import randomize


class Block(nn.Module):
    """conv, norm, ReLU twice with a shortcut, then a linear layer."""

    def __init__(self, norm=nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = norm(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = norm(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = x + self.bn2(self.conv2(x)).relu()
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def psbn() -> Block:
    return randomize(Block(lambda n: psBN2d(n, alpha=0.3))).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8)


@pytest.fixture
def y(psbn, x) -> torch.Tensor:
    with torch.no_grad():
        return psbn(x)


# -- fusing and freezing -----------------------------------------------------


def test_mmcv_fuse_conv_bn(psbn, x, y):
    from mmcv.cnn import fuse_conv_bn

    fused = fuse_conv_bn(copy.deepcopy(psbn))
    assert isinstance(fused.bn1, nn.Identity)
    assert_close(fused(x), y)


def test_torch_fuse_conv_bn_eval(psbn, x, y):
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    fused = fuse_conv_bn_eval(psbn.conv1, psbn.bn1)
    assert_close(fused(x), psbn.bn1(psbn.conv1(x)))


def test_mmdet_frozen_batch_norm(psbn, x, y):
    from mmdet.models.layers.brick_wrappers import FrozenBatchNorm2d

    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(copy.deepcopy(psbn))
    assert isinstance(frozen.bn1, FrozenBatchNorm2d)
    assert_close(frozen(x), y)


def test_mmengine_efficient_conv_bn_eval(psbn, x, y):
    from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval

    model = nn.ModuleDict({"backbone": copy.deepcopy(psbn).train()})
    turn_on_efficient_conv_bn_eval(model, "backbone")
    assert_close(model["backbone"].eval()(x), y)
    model["backbone"].train()
    assert_close(model["backbone"](x), psbn.train()(x))
    # and the parameters are trained through it
    model["backbone"].eval()(x).sum().backward()
    assert model["backbone"].bn1.beta.grad.abs().sum() > 0


# -- tracing -----------------------------------------------------------------


@pytest.mark.parametrize("norm", [psBN2d, psSyncBN, lambda n: psIN(n, track_running_stats=True)])
@pytest.mark.parametrize("traced_in_training", [True, False])
def test_fx_keeps_the_layer_whole(norm, traced_in_training, x):
    model = randomize(Block(norm)).train(traced_in_training)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    for training in (True, False):
        assert_close(traced.train(training)(x), model.train(training)(x))


class NamingTracer(torch.fx.Tracer):
    """As torchvision's feature extractor: nodes are named by the module that is being called."""

    def __init__(self):
        super().__init__()
        self.called, self.names = "", {}

    def call_module(self, m, forward, args, kwargs):
        before, self.called = self.called, self.path_of_module(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self.called = before

    def create_node(self, *args, **kwargs):
        node = super().create_node(*args, **kwargs)
        self.names[node.name] = self.called
        return node


def test_tracers_that_follow_calls_see_those_of_bn():
    names = []
    for norm in (nn.BatchNorm2d, psBN2d, psSyncBN):
        tracer = NamingTracer()
        tracer.trace(Block(norm))
        names.append(tracer.names)
    assert names[0] == names[1] == names[2]
    assert names[0]["bn1"] == "bn1"


def test_precise_bn_and_freezing_find_every_layer(x):
    """They look for BatchNorm2d (fvcore, timm); a wrapper is not counted beside what it wraps."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    from psbn_mmdet.norm import norm_layers

    for kind in (psBN2d, psSyncBN):
        model = Block(kind)
        assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 2
        model.bn1 = checkpoint_wrapper(model.bn1)
        assert len(norm_layers(model)) == 2


def test_fx_of_a_layer_alone_is_refused_as_that_of_bn():
    for layer in (nn.BatchNorm2d(3), psBN2d(3)):
        with pytest.raises(torch.fx.proxy.TraceError):
            torch.fx.symbolic_trace(layer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("norm", [psBN2d, psIN, psSyncBN])
@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript(norm, how, x):
    model = randomize(Block(norm)).eval()
    scripted = torch.jit.script(model) if how == "script" else torch.jit.trace(model, x)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    assert_close(torch.jit.load(buffer)(x), model(x))


class AddsBias(torch.nn.Module):
    """Reads the bias of its layer, as code that fuses or regularises does."""

    def __init__(self):
        super().__init__()
        self.norm = randomize(psBN2d(3, alpha=0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm.bias.sum()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_bias_is_beta_plus_alpha_wherever_it_is_read():
    model, x = AddsBias(), torch.zeros(2)
    want = (model.norm.beta + 0.3).sum().expand(2)
    assert_close(model(x), want)
    assert_close(torch.jit.script(model)(x), want)
    assert_close(torch.jit.trace(model, x)(x), want)
    with torch.inference_mode():
        assert_close(model(x), want)
        made = psBN2d(3, alpha=0.3)  # its beta, 0, is an inference tensor
        assert_close(made.bias.clone(), torch.full((3,), 0.3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_in_training(psbn, x):
    scripted = torch.jit.script(copy.deepcopy(psbn).train())
    assert_close(scripted(x), psbn.train()(x))
    assert_close(scripted.bn1.running_mean, psbn.bn1.running_mean)
    # where it would have to synchronise it cannot, and says so
    layer = torch.jit.script(psSyncBN(3).train())
    with pytest.raises(torch.jit.Error, match="cannot synchronize"):
        layer(x)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_torch_compile(psbn, x, training):
    psbn.double().train(training)  # in float32 gradients through BN differ by rounding alone
    compiled = torch.compile(copy.deepcopy(psbn), fullgraph=True)
    a, b = psbn(x.double()), compiled(x.double())
    assert_close(b, a)
    a.sum().backward()
    b.sum().backward()
    for p, q in zip(psbn.parameters(), compiled.parameters(), strict=True):
        assert_close(q.grad, p.grad)


def test_torch_export(psbn, x, y):
    exported = torch.export.export(psbn, (x,))
    assert_close(exported.module()(x), y)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("norm", [psBN2d, psIN, psSyncBN])
def test_onnx(norm, x, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = randomize(Block(norm)).eval()
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x,), path, dynamo=False, input_names=["x"])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": x.numpy()})
    assert_close(torch.from_numpy(result), model(x), rtol=1e-4, atol=1e-5)


# -- copies, precision, layout -------------------------------------------------


def test_deepcopy_pickle_and_torch_save(psbn, x, y):
    assert_close(copy.deepcopy(psbn)(x), y)
    layer = pickle.loads(pickle.dumps(psbn.bn1))
    assert torch.equal(layer.bias, psbn.bn1.bias)
    buffer = io.BytesIO()
    torch.save(psbn.state_dict(), buffer)
    buffer.seek(0)
    fresh = Block(psBN2d).eval()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert_close(fresh(x), y)


def test_mmengine_ema(psbn):
    from mmengine.model import ExponentialMovingAverage

    ema = ExponentialMovingAverage(psbn, momentum=0.5, update_buffers=True)
    ema.update_parameters(psbn)  # the first one copies
    before = psbn.bn1.beta.detach().clone()
    with torch.no_grad():
        psbn.bn1.beta.add_(1.0)
    ema.update_parameters(psbn)
    assert_close(ema.module.bn1.beta, before + 0.5)
    # alpha is constant; an average of copies of it, off by rounding, is not what is added or saved
    ema.module.bn1.alpha.add_(1e-6)
    assert torch.equal(ema.module.bn1.bias, ema.module.bn1.beta + 0.3)
    assert torch.equal(ema.module.bn1.state_dict()["alpha"], torch.tensor(0.3))


def test_functional_call(psbn, x):
    parameters = {k: torch.zeros_like(v) for k, v in psbn.named_parameters()}
    parameters["fc.weight"] = torch.ones(4, 8)
    # all gammas and betas 0: each ReLU gives alpha = 0.3, the sum of both 0.6
    expected = torch.full((4, 4), 8 * 0.6)
    assert_close(torch.func.functional_call(psbn, parameters, (x,)), expected)


def test_autocast_half_double_channels_last(psbn, x, y):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(psbn(x).float(), y, rtol=0.05, atol=0.05)  # 8 bits of mantissa, 5 layers
    assert_close(psbn(x.to(memory_format=torch.channels_last)), y)
    assert_close(copy.deepcopy(psbn).double()(x.double()).float(), y)
    half = copy.deepcopy(psbn).bfloat16()
    assert_close(half(x.bfloat16()).float(), y, rtol=0.05, atol=0.05)


# -- kinds of synchronisation ----------------------------------------------------


def test_torch_convert_sync_batchnorm_leads_to_pssyncbn(psbn):
    with pytest.raises(TypeError, match="psSyncBN is its synchronised form"):
        nn.SyncBatchNorm.convert_sync_batchnorm(psbn)


def test_mmengine_convert_sync_batchnorm_leads_to_pssyncbn(psbn):
    from mmengine.model import convert_sync_batchnorm

    with pytest.raises(TypeError, match="psSyncBN is its synchronised form"):
        convert_sync_batchnorm(psbn, "torch")


def test_the_way_out_that_the_message_names(psbn, x, y):
    model = to_psbn(nn.SyncBatchNorm.convert_sync_batchnorm(to_bn(psbn)))
    assert isinstance(model.bn1, psSyncBN)
    assert_close(model.eval()(x), y)  # below torch 2.2 the new layer begins in training


def test_mmengine_revert_sync_batchnorm_leaves_pssyncbn_alone(x):
    from mmengine.model import revert_sync_batchnorm

    model = randomize(Block(psSyncBN)).eval()
    y = model(x)
    model = revert_sync_batchnorm(model)
    assert isinstance(model.bn1, psSyncBN)
    assert_close(model(x), y)


# -- who must refuse ---------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantization_fuse_modules_raises_and_to_bn_is_the_way_out(psbn, x, y):
    from torch.ao.quantization import fuse_modules

    with pytest.raises(AssertionError, match=r"did not find fuser.*psBN2d"):
        fuse_modules(copy.deepcopy(psbn), [["conv1", "bn1"]])
    assert_close(fuse_modules(to_bn(psbn), [["conv1", "bn1"]])(x), y)


def test_torch_pruning_raises_and_to_bn_is_the_way_out(psbn, x):
    tp = pytest.importorskip("torch_pruning")

    def prune(model):
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
        graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, idxs=[0]).prune()
        return model

    with pytest.raises((AttributeError, KeyError, TypeError), match="bias"):
        prune(copy.deepcopy(psbn))
    assert prune(to_bn(psbn)).bn1.num_features == 7


# -- mm* conventions ---------------------------------------------------------------


def test_names_and_types_that_mm_libraries_look_at():
    from mmcv.cnn import build_norm_layer
    from mmcv.cnn.bricks.norm import infer_abbr, is_norm
    from mmengine.model import constant_init
    from mmengine.model.weight_init import ConstantInit

    for kind, abbr in [("psBN", "bn"), ("psSyncBN", "bn"), ("psIN", "in")]:
        name, layer = build_norm_layer({"type": kind, "alpha": 0.2, "requires_grad": False}, 8, 1)
        assert name == f"{abbr}1" == f"{infer_abbr(type(layer))}1"
        assert is_norm(layer)
        assert layer.alpha == torch.tensor(0.2)
        assert not any(p.requires_grad for p in layer.parameters())
    layer = psBN2d(4)
    ConstantInit(val=0.5, layer="_BatchNorm")(layer)
    assert torch.equal(layer.weight, torch.full((4,), 0.5))
    constant_init(layer, 1)
    assert torch.equal(layer.weight, torch.ones(4))
    assert torch.equal(layer.bias, torch.zeros(4))


def test_norm_eval_and_frozen_stages_of_mmdet_resnet():
    from mmdet.models import ResNet

    model = ResNet(18, norm_cfg={"type": "psBN"}, norm_eval=True, frozen_stages=1)
    model.train()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, psBN2d)}
    assert len(layers) == 20
    assert not any(m.training for m in layers.values())
    for name, layer in layers.items():
        assert layer.beta.requires_grad == (not name.startswith(("bn1", "layer1")))


@pytest.mark.parametrize("mult", [1.0, 0.0])
def test_norm_decay_mult_sees_beta_and_bias_rules_do_not(psbn, mult):
    from mmengine.optim import build_optim_wrapper

    wrapper = build_optim_wrapper(
        psbn,
        {
            "optimizer": {"type": "SGD", "lr": 0.1, "weight_decay": 0.01},
            "paramwise_cfg": {"norm_decay_mult": mult, "bias_decay_mult": 0.0, "bias_lr_mult": 2.0},
        },
    )
    decay = {id(g["params"][0]): g["weight_decay"] for g in wrapper.optimizer.param_groups}
    assert decay[id(psbn.bn1.beta)] == 0.01 * mult
    assert decay[id(psbn.bn1.weight)] == 0.01 * mult
    assert decay[id(psbn.conv1.bias)] == 0.0
