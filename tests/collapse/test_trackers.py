"""The hook's numbers in the trackers that people use, under one prefix and when measured."""

import json
import struct
import time

import pytest

from psbn_mmdet.collapse.hook import SparsityLoggerHook
from tests.helpers.collapsed_net import Net, collapse_by_hand
from tests.helpers.toy_runner import make_runner

# Of 28 filters 8 have collapsed; of the 12 with a ReLU right behind 1 is inactive.
WANTED = {
    "collapse/collapsed_percent": 100 * 8 / 28,
    "collapse/inactive_percent": 100 * 1 / 12,
    "collapse/not_finite": 0,
}
STEPS = [0, 5, 10, 12]  # LoggerHook logs at 4, 8 and 12


def train(tmp_path, backend):
    """Train what does not move, so that every value is known."""
    net = collapse_by_hand(Net())
    for parameter in net.parameters():
        parameter.requires_grad_(parameter is net.fc.bias)
    make_runner(
        tmp_path,
        [SparsityLoggerHook(5, figures=False)],
        net,
        visualizer={"type": "Visualizer", "vis_backends": [backend], "name": str(tmp_path)},
    ).train()


def check(curves):
    """curves: name -> [(step, value), ...] of all that was logged."""
    assert {name for name in curves if "/" in name} == {
        *WANTED,
        "collapse/activation_probability",
    }
    assert "loss" in curves  # LoggerHook's own are beside it
    for name, value in WANTED.items():
        steps, values = zip(*curves[name], strict=True)
        assert list(steps) == STEPS, name
        assert list(values) == pytest.approx([value] * 4), name


def test_tensorboard(tmp_path):
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, {"type": "TensorboardVisBackend"})
    (events,) = tmp_path.glob("**/events.out*")
    read = module.EventAccumulator(str(events.parent)).Reload()
    check(
        {name: [(e.step, e.value) for e in read.Scalars(name)] for name in read.Tags()["scalars"]}
    )


def test_mlflow_with_sqlite(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.chdir(tmp_path)  # where it puts artifacts
    store = f"sqlite:///{tmp_path}/mlflow.db"
    train(tmp_path, {"type": "MLflowVisBackend", "tracking_uri": store})
    mlflow.end_run()
    client = mlflow.MlflowClient(store)
    (experiment,) = client.search_experiments()
    (run,) = client.search_runs([experiment.experiment_id])
    histories = {n: client.get_metric_history(run.info.run_id, n) for n in run.data.metrics}
    check({n: sorted((m.step, m.value) for m in history) for n, history in histories.items()})


def wandb_records(content):
    """The records of a .wandb file: LevelDB's log format behind 7 bytes of its own."""
    at, record, block = 7, b"", 1 << 15
    while at + 7 <= len(content):
        if (rest := block - at % block) < 7:
            at += rest
            continue
        length, kind = struct.unpack_from("<4xHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_offline(tmp_path):
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    backend = {
        "type": "WandbVisBackend",
        "init_kwargs": {"mode": "offline", "project": "p"},
        "define_metric_cfg": [{"name": "collapse/*", "step_metric": "iter"}],
    }
    train(tmp_path, backend)
    wandb.finish()
    (path,) = tmp_path.glob("**/run-*.wandb")
    records, deadline = [], time.monotonic() + 60
    while not any(
        r.WhichOneof("record_type") == "exit" for r in records
    ):  # by a process of its own
        assert time.monotonic() < deadline
        time.sleep(0.1)
        records = [
            wandb_internal_pb2.Record.FromString(data) for data in wandb_records(path.read_bytes())
        ]
    curves = {}
    for record in records:
        row = {
            "/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item
        }
        for name, value in row.items():  # mmengine passes no step on: "iter" is the axis
            if not name.startswith("_"):
                curves.setdefault(name, []).append((row["iter"], value))
    check(curves)
    (metric,) = (r.metric for r in records if r.WhichOneof("record_type") == "metric")
    assert (metric.glob_name, metric.step_metric) == ("collapse/*", "iter")
