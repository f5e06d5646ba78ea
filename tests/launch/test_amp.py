"""Mixed precision: float16 on GPU, bfloat16 on a CPU that computes in it, a line elsewhere."""

import pytest
import torch
from mmengine.config import Config
from torch import nn

from psbn_mmdet.launch import UsageError, run
from psbn_mmdet.launch.amp import BFloat16OptimWrapper, cpu_has_bfloat16
from tests.helpers.forked import train
from tests.helpers.noisy_training import equal, last, make_config


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 sse\n", True),
        ("flags\t\t: fpu amx_tile amx_bf16\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni\n", False),
        (None, False),
    ],
)
def test_what_the_processor_can_is_read_from_cpuinfo(text, has, tmp_path):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert cpu_has_bfloat16(tmp_path / "cpuinfo") is has


def test_the_forward_pass_is_in_bfloat16_and_weights_and_gradients_stay_float32():
    model = nn.Linear(3, 2)
    wrapper = BFloat16OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.randn(4, 3)
    with wrapper.optim_context(model):
        y = model(x)
    assert y.dtype == torch.bfloat16
    expected = x.bfloat16() @ model.weight.T.bfloat16() + model.bias.bfloat16()
    torch.testing.assert_close(y, expected)
    wrapper.backward(y.float().sum())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert model(x).dtype == torch.float32  # nothing of it is left behind


def amp_on(monkeypatch, device, has):
    monkeypatch.setattr(run, "get_device", lambda: device)
    monkeypatch.setattr(run, "cpu_has_bfloat16", lambda: has)


def test_amp_trains_on_a_cpu_and_resumes_exactly(monkeypatch, tmp_path):
    amp_on(monkeypatch, "cpu", True)
    plain, kill = make_config(tmp_path / "a.py"), [{"type": "Kill", "iteration": 5}]
    train(plain, tmp_path / "plain")
    (ended,) = train(plain, tmp_path / "whole", "--amp")
    assert ended.status == 0, ended.text
    assert not equal(last(tmp_path / "plain"), last(tmp_path / "whole"))
    train(make_config(tmp_path / "b.py", hooks=kill), tmp_path / "w", "--amp")
    train(plain, tmp_path / "w", "--amp", "--resume")
    assert equal(last(tmp_path / "w"), last(tmp_path / "whole"))


def test_amp_where_it_would_only_be_slower_is_refused_in_a_line(monkeypatch, tmp_path):
    amp_on(monkeypatch, "cpu", False)
    (ended,) = train(make_config(tmp_path / "a.py"), tmp_path / "w", "--amp")
    assert (ended.status, ended.text.count("\n")) == (2, 1)
    assert "--amp needs a GPU or a processor with bfloat16" in ended.text


def test_amp_on_a_gpu_is_mmengines_own(monkeypatch):
    amp_on(monkeypatch, "cuda", False)
    cfg = Config({"optim_wrapper": {"type": "OptimWrapper", "clip_grad": {"max_norm": 1}}})
    run._use_amp(cfg)
    assert cfg.optim_wrapper == {
        "type": "AmpOptimWrapper",
        "loss_scale": "dynamic",
        "clip_grad": {"max_norm": 1},
    }


@pytest.mark.parametrize("kind", ["ApexOptimWrapper", "mmengine.DeepSpeedOptimWrapper"])
def test_amp_replaces_no_wrapper_of_another_kind(kind):
    with pytest.raises(UsageError, match="would replace the optim_wrapper"):
        run._use_amp(Config({"optim_wrapper": {"type": kind}}))
