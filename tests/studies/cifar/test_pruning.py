"""Three ways to the same FLOPs: what is left, counted by hand, and the runs that start from it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from studies.cifar.experiments import build
from studies.cifar.networks import macs_of
from studies.cifar.pruning import cut
from studies.cifar.rounds import network_state, train_run
from studies.cifar.settings import Settings
from studies.cifar.summary import redraw, write_results
from studies.runs import RunError, folder_of, result_of
from tests.helpers.cifar_files import write_cifar

COLLAPSED = Settings(width=0.25, image_size=16)
CHANNELS = (4, 8, 16)  # of its stages


def macs(channels, inner):
    """Of ResNet-20 at 16x16: 9 multiply-accumulates a weight of a 3x3 kernel and output pixel."""
    total = 9 * 3 * channels[0] * 16 * 16
    before = channels[0]
    for stage, (c, m) in enumerate(zip(channels, inner, strict=True)):
        pixels = (16 >> stage) ** 2
        total += 9 * (before * m + m * c + 2 * (c * m + m * c)) * pixels
        before = c
    return total + channels[-1] * 10


@torch.no_grad()
def kill_half(state):
    """Half of the filters between the convolutions of each block: gamma 0 and beta -1."""
    for key, gamma in state.items():
        if key.endswith("bn1.weight") and "layer" in key:
            gamma[::2] = 0
            state[key.replace("weight", "bias")][::2] = -1


def collapsed_network():
    torch.manual_seed(0)
    network = COLLAPSED.network_module().eval()
    kill_half(network.state_dict())
    return network


HALF = macs(CHANNELS, [c // 2 for c in CHANNELS])


def test_stripped_has_half_of_what_is_within_blocks_and_the_same_function():
    network = collapsed_network()
    assert macs_of(network, 16) == macs(CHANNELS, CHANNELS)
    stripped = cut(network, replace(COLLAPSED, cut="strip", parent="p"))
    assert macs_of(stripped, 16) == HALF
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(stripped(x), network(x), rtol=1e-5, atol=1e-5)


def test_uniform_is_the_widest_network_of_no_more_flops():
    uniform = cut(collapsed_network(), replace(COLLAPSED, cut="uniform", parent="p"))
    stages = [uniform.layer1[0], uniform.layer2[0], uniform.layer3[0]]
    channels = [block.conv2.out_channels for block in stages]
    assert macs_of(uniform, 16) == macs(channels, channels) <= HALF
    # The rounded channels of 16, 32 and 64 times a factor; the next step up is too large.
    assert all(abs(c - 16 * 2**i * channels[2] / 64) <= 1 for i, c in enumerate(channels))
    wider = [round(n * (channels[2] + 1) / 64) for n in (16, 32, 64)]
    assert macs(wider, wider) > HALF


def test_torch_pruning_comes_as_low_and_not_by_a_tenth_more():
    pruned = cut(collapsed_network(), replace(COLLAPSED, cut="magnitude", parent="p"))
    assert 0.9 * HALF < macs_of(pruned, 16) <= HALF
    assert pruned(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_nothing_collapsed_is_one_line():
    network = COLLAPSED.network_module().eval()
    with pytest.raises(RunError, match="nothing has collapsed that could be taken out"):
        cut(network, replace(COLLAPSED, cut="strip", parent="p"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(cut="half", parent="p"), "cut must be strip, magnitude, uniform or None, got 'half'"),
        (dict(cut="strip"), "only a parent's network with BN can be cut"),
        (dict(cut="strip", parent="p", norm="psBN"), "only a parent's network with BN"),
    ],
)
def test_impossible_cuts_are_refused(change, message):
    with pytest.raises(RunError, match=message):
        Settings(**change)


@pytest.mark.slow
def test_experiment_trains_each_on_and_shows_what_it_costs(tmp_path):
    root = write_cifar(tmp_path / "cifar")
    toy = dict(width=0.25, images=40, test_images=20, batch_size=20, epochs=1, rounds=2)
    experiment = build("strip", "reduced", toy, seeds=1)
    trunk, *children = experiment.runs
    folder = folder_of(experiment, trunk, tmp_path)
    train_run(trunk.settings, folder, root)
    checkpoint = torch.load(folder / "round_2.pth", weights_only=True)
    kill_half(checkpoint["state_dict"])
    torch.save(checkpoint, folder / "round_2.pth")
    for run in children:
        train_run(run.settings, folder_of(experiment, run, tmp_path), root)

    starts = {run.settings.cut: result_of(experiment, run, tmp_path) for run in children}
    assert [starts["uniform"]["settings"]["rounds"], len(starts["uniform"]["rounds"])] == [3, 3]
    assert starts["strip"]["start"]["macs"] == HALF
    assert "start" not in starts[None]
    trained = network_state(folder_of(experiment, children[1], tmp_path) / "round_1.pth")
    assert trained["layer3.0.conv1.weight"].shape == (8, 8, 3, 3)

    content, table, png = write_results(experiment, tmp_path, command="the command")
    summary = json.loads(content.read_text())
    whole = macs(CHANNELS, CHANNELS)
    assert summary["cuts"]["as it is"]["flops_percent"]["mean"] == 100
    assert summary["cuts"]["stripped"]["flops_percent"]["mean"] == pytest.approx(100 * HALF / whole)
    assert f"| stripped | {100 * HALF / whole:.2f} | " in table.read_text()
    assert all(len(summary["cuts"][a]["time_percent"]) == 3 for a in ("stripped", "Torch-Pruning"))
    (tmp_path / "alone").mkdir()
    again = redraw(shutil.copy(content, tmp_path / "alone"))
    assert [path.read_bytes() for path in again] == [table.read_bytes(), png.read_bytes()]


@pytest.mark.slow
def test_killed_after_the_cut_it_goes_on_with_the_cut_network(tmp_path):
    """The folder of a run holds weights alone; the network around them is cut once more."""
    root = write_cifar(tmp_path / "cifar")
    parent = Settings(width=0.25, images=40, test_images=20, batch_size=20, epochs=1, rounds=1)
    train_run(parent, tmp_path / "parent", root)
    path = tmp_path / "parent" / "round_1.pth"
    checkpoint = torch.load(path, weights_only=True)
    kill_half(checkpoint["state_dict"])
    torch.save(checkpoint, path)
    child = replace(parent, rounds=2, parent="parent", cut="magnitude")
    whole = train_run(child, tmp_path / "child", root)
    shutil.copytree(tmp_path / "child", tmp_path / "again")
    (tmp_path / "again" / "result.json").unlink()
    (tmp_path / "again" / "round_2.pth").unlink()
    assert train_run(child, tmp_path / "again", root) == whole
