"""collapse.trace: what is written comes back exactly, whatever the disk and other processes do."""

import contextlib
import errno
import gc
import io
import os
import signal
import subprocess
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from psbn_mmdet import norm
from psbn_mmdet.collapse import measure, trace
from tests.helpers.collapsed_net import Net, collapse_by_hand
from tests.helpers.disk import files_no_larger_than


def values_of(filters, seed):
    """gamma, bias, norm and what they do, of a seed."""
    g = torch.Generator().manual_seed(seed)
    gamma, bias, l1 = torch.randn(3, filters, generator=g)
    return gamma, bias, l1.half(), torch.randint(0, 4, (filters,), generator=g).byte()


def assert_holds(path, filters, seeds):
    """Whether a file has exactly the records {iteration: seed}, with the values of the seeds."""
    got = trace.read(path)
    assert got.iterations.tolist() == list(seeds)
    for row, seed in enumerate(seeds.values()):
        for name, values in zip(("gamma", "bias", "norm", "does"), values_of(filters, seed)):
            assert np.array_equal(getattr(got, name)[row], values.numpy())


class TestWriter:
    report = measure(collapse_by_hand(Net()))

    def fill(self, folder, iterations):
        folder.mkdir(exist_ok=True)
        writer = trace.Writer(folder, self.report, 0)
        for i in iterations:
            writer.write(i, *values_of(28, i))
        writer.close()
        return writer.path

    def test_a_record_takes_11_bytes_a_filter(self, tmp_path):
        sizes = [self.fill(tmp_path / f"{n}", range(n)).stat().st_size for n in (1, 2, 5)]
        assert sizes[1] - sizes[0] == 12 + 28 * 11
        assert sizes[2] - sizes[0] == 4 * (12 + 28 * 11)

    def test_records_after_the_resumed_iteration_are_dropped_and_none_is_doubled(self, tmp_path):
        path = self.fill(tmp_path, [0, 10, 20, 30])
        writer = trace.Writer(tmp_path, self.report, 20)
        assert writer.path == path
        assert trace.read(path).iterations.tolist() == [0, 10, 20]
        for i in (20, 30, 40):
            writer.write(i, *values_of(28, i + 1))
        assert_holds(path, 28, {0: 0, 10: 10, 20: 20, 30: 31, 40: 41})

    def test_every_cut_and_a_tail_of_zeros_keep_the_whole_records(self, tmp_path):
        path = self.fill(tmp_path, [0, 1, 2])
        content = path.read_bytes()
        record = 12 + 28 * 11
        for length in range(len(content) - 2 * record, len(content)):
            for tail in (b"", bytes(len(content) - length)):
                cut = content[:length] + tail
                path.write_bytes(cut)
                ends = [len(content) - n * record for n in (2, 1, 0)]
                whole = sum(cut[:end] == content[:end] for end in ends)
                assert len(trace.read(path).iterations) == whole

    def test_a_flipped_bit_anywhere_costs_one_record_or_is_told(self, tmp_path):
        path = self.fill(tmp_path, [0, 1, 2])
        content = path.read_bytes()
        start = len(content) - 3 * (12 + 28 * 11)
        for at in [*range(0, len(content), 7), *range(start, start + 16)]:
            damaged = bytearray(content)
            damaged[at] ^= 1 << at % 8
            path.write_bytes(damaged)
            if at < start:
                with pytest.raises(trace.TraceError, match=r"is no trace file|earlier version"):
                    trace.read(path)
            else:
                lost = (at - start) // (12 + 28 * 11)
                assert_holds(path, 28, {i: i for i in range(3) if i != lost})

    def test_a_torn_end_is_written_over(self, tmp_path):
        path = self.fill(tmp_path, [0, 1, 2])
        path.write_bytes(path.read_bytes()[:-7])
        writer = trace.Writer(tmp_path, self.report, 1)
        writer.write(5, *values_of(28, 5))
        assert_holds(path, 28, {0: 0, 1: 1, 5: 5})

    def test_a_run_from_the_start_or_of_another_model_has_a_file_of_its_own(self, tmp_path):
        path = self.fill(tmp_path, [0, 1])
        content = path.read_bytes()
        again = trace.Writer(tmp_path, self.report, 0)
        assert again.path == tmp_path / "collapse-1.trace"
        again.write(0, *values_of(28, 2))
        other = measure(nn.BatchNorm2d(3))
        assert trace.Writer(tmp_path, other, 7).path == tmp_path / "collapse-2.trace"
        assert path.read_bytes() == content
        (tmp_path / "collapse-2.trace").unlink()
        assert_holds(tmp_path, 28, {0: 2})  # the newest

    def test_it_is_read_by_mapping(self, tmp_path):
        got = trace.read(self.fill(tmp_path, [0, 1]))
        assert isinstance(got.gamma.base, np.memmap)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "no such file"),
            (b"", "is empty"),
            (b"hello\n", "is no trace file"),
            (b"psbn-trace 1\n", "earlier version"),
            (b"psbn-trace 2 00000000\n{}\n", "is no trace file"),
            (b"psbn-trace 2 a3", "is no trace file"),
        ],
    )
    def test_what_is_no_trace_gets_one_line(self, content, message, tmp_path):
        path = tmp_path / "a.trace"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(trace.TraceError, match=message) as error:
            trace.read(path)
        assert str(error.value).startswith(str(path))
        assert "\n" not in str(error.value)

    def test_a_trace_without_a_record_says_so(self, tmp_path):
        path = self.fill(tmp_path, [0])
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(trace.TraceError, match="holds no whole record"):
            trace.read(path)

    def test_checkpoints_of_different_networks_are_no_series(self):
        reports = [self.report, measure(nn.BatchNorm2d(3))]
        with pytest.raises(trace.TraceError, match="b has other layers than a"):
            trace.from_reports(reports, ["a", "b"])


def test_what_a_report_says_survives_the_file(tmp_path):
    # ReLU, none and psBN: what follows a layer and its alpha decide what is counted.
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8),
        nn.SiLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(),
    )  # fmt: skip
    norm.to_psbn(net)
    with torch.no_grad():
        for i in (1, 4, 7):
            net[i].weight[:2] = 0
            net[i].beta.zero_()
            net[i].beta[:1] = -1
        net[7].weight[2:] = 0.01  # against an alpha of 0.1
        net[1].weight[7] = torch.nan
    report = measure(net)
    layers = report.layers
    writer = trace.Writer(tmp_path, report, 0)
    writer.write(
        0, *(torch.cat([getattr(x, n) for x in layers])
             for n in ("gamma", "bias", "filter_l1", "does"))
    )  # fmt: skip
    again = trace.read(tmp_path).report()
    assert again.totals == pytest.approx(report.totals, nan_ok=True)
    assert again.nearly_linear == ["7"]
    assert str(again) == str(report)  # the norms to three digits


FILTERS = 1000  # a record of 11 kB


def a_report(filters=FILTERS):
    return measure(nn.BatchNorm2d(filters))


@pytest.fixture
def mounted(tmp_path):
    """Mounts a small real file system; for root only."""
    places = []

    def mount(options):
        place = tmp_path / f"mount{len(places)}"
        place.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "none", place]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root, and not in every container, may mount a file system")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "--lazy", place], check=True)


def write_until(writer, failing, iterations):
    """The iterations whose record was written; the first and only error is as expected."""
    written = []
    for i in iterations:
        try:
            writer.write(i, *values_of(FILTERS, i))
            written.append(i)
        except OSError as error:
            assert error.errno == failing  # noqa: PT017
    return written


class TestDisk:
    def check(self, writer, failing, full, free):
        """Whole records while the disk is full, and more when there is space again."""
        with full:
            before = write_until(writer, failing, range(20))
            assert 2 < len(before) < 19  # so that many fail one after the other
            assert_holds(writer.path, FILTERS, {i: i for i in before})
        free()
        for i in (30, 40):
            writer.write(i, *values_of(FILTERS, i))
        assert_holds(writer.path, FILTERS, {i: i for i in [*before, 30, 40]})

    def test_a_limit_of_the_size(self, tmp_path):
        writer = trace.Writer(tmp_path, a_report(), 0)
        self.check(writer, errno.EFBIG, files_no_larger_than(100_000), lambda: None)

    def test_a_files_no_larger_than(self, mounted):
        disk = mounted("size=128k")
        filler = disk / "filler"
        filler.write_bytes(bytes(32_768))
        writer = trace.Writer(disk, a_report(), 0)
        # A page or two are left for small things, until something else takes them.
        self.check(writer, errno.ENOSPC, contextlib.nullcontext(), filler.unlink)

    def test_a_disk_that_is_full_from_the_start(self, mounted):
        disk = mounted("size=16k")
        writer = trace.Writer(disk, a_report(), 0)
        filler = disk / "filler"
        with pytest.raises(OSError, match="No space left"):
            filler.write_bytes(bytes(20_000))
        assert write_until(writer, errno.ENOSPC, range(3)) == []
        with pytest.raises(trace.TraceError, match="is empty; the run has not recorded anything"):
            trace.read(writer.path)
        filler.unlink()
        writer.write(5, *values_of(FILTERS, 5))
        assert_holds(writer.path, FILTERS, {5: 5})

    def test_a_disk_that_is_full_only_when_synchronised(self, tmp_path, monkeypatch):
        writer = trace.Writer(tmp_path, a_report(), 0)
        writer.write(0, *values_of(FILTERS, 0))
        with monkeypatch.context() as patched:

            def full(_):
                raise OSError(errno.ENOSPC, "No space left on device")

            patched.setattr(os, "fsync", full)
            assert write_until(writer, errno.ENOSPC, [1]) == []
            assert_holds(writer.path, FILTERS, {0: 0})
        writer.write(1, *values_of(FILTERS, 1))
        assert_holds(writer.path, FILTERS, {0: 0, 1: 1})

    @pytest.mark.parametrize("portion", [1, 1000, 0])
    def test_writes_that_take_a_part_and_a_disk_that_takes_nothing_back(
        self, portion, tmp_path, monkeypatch
    ):
        class Short(io.FileIO):
            broken = False

            def write(self, content):
                if self.broken:
                    super().write(content[:7])
                    raise OSError(errno.EIO, "Input/output error")
                return super().write(content[:portion] if portion else content)

            def truncate(self, size=None):
                if self.broken:
                    raise OSError(errno.EIO, "Input/output error")
                return super().truncate(size)

        monkeypatch.setattr(trace, "open", lambda *args, **_: Short(*args[:2]), raising=False)
        writer = trace.Writer(tmp_path, a_report(), 0)
        writer.write(0, *values_of(FILTERS, 0))
        Short.broken = True
        assert write_until(writer, errno.EIO, [1, 2]) == []
        assert_holds(writer.path, FILTERS, {0: 0})
        Short.broken = False
        writer.write(3, *values_of(FILTERS, 3))
        assert_holds(writer.path, FILTERS, {0: 0, 3: 3})

    def test_a_folder_that_is_read_only(self, tmp_path, mounted):
        folder = tmp_path / "locked"
        if os.geteuid() == 0:  # whom no mode keeps from writing
            folder = mounted("size=16k,ro")
        else:
            folder.mkdir(mode=0o555)
        with pytest.raises(OSError, match=r"Read-only|Permission"):
            trace.Writer(folder, a_report(), 0)


def forked(run):
    """A child process that runs a function and nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the threads of the parent's pool are not in the child
            run()
        finally:
            os._exit(0)
    return child


class TestProcesses:
    def test_a_process_killed_while_it_writes(self, tmp_path):
        filters = 100_000  # most of the time goes into writing
        pairs = [values_of(filters, seed) for seed in range(3)]
        path = tmp_path / "collapse.trace"

        def write_for_ever():
            writer = trace.Writer(tmp_path, a_report(filters), 0)
            for i in range(1_000_000):
                writer.write(i, *pairs[i % 3])

        child = forked(write_for_ever)
        size, deadline = 0, time.monotonic() + 60
        while size < 5_000_000 and time.monotonic() < deadline:
            size = path.stat().st_size if path.exists() else 0
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        count = len(trace.read(path).iterations)
        assert count >= 3
        assert_holds(path, filters, {i: i % 3 for i in range(count)})
        again = trace.Writer(tmp_path, a_report(filters), count - 1)
        again.write(count, *pairs[0])
        assert_holds(path, filters, {**{i: i % 3 for i in range(count)}, count: 0})

    def test_the_one_that_comes_second_is_told_and_the_file_stays_whole(self, tmp_path):
        first = trace.Writer(tmp_path, a_report(), 0)
        for i in (0, 10):
            first.write(i, *values_of(FILTERS, i))
        second = trace.Writer(tmp_path, a_report(), 10)
        first.write(20, *values_of(FILTERS, 20))
        with pytest.raises(trace.TraceError, match="are two runs going on in one work dir"):
            second.write(20, *values_of(FILTERS, 21))
        first.write(30, *values_of(FILTERS, 30))
        assert_holds(first.path, FILTERS, {i: i for i in (0, 10, 20, 30)})

    def test_the_one_whose_records_a_resumed_run_dropped_is_told(self, tmp_path):
        first = trace.Writer(tmp_path, a_report(), 0)
        for i in (0, 10, 20):
            first.write(i, *values_of(FILTERS, i))
        second = trace.Writer(tmp_path, a_report(), 10)
        with pytest.raises(trace.TraceError, match="are two runs going on in one work dir"):
            first.write(30, *values_of(FILTERS, 30))
        second.write(20, *values_of(FILTERS, 21))
        assert_holds(first.path, FILTERS, {0: 0, 10: 10, 20: 21})

    def test_two_from_scratch_have_a_file_each(self, tmp_path):
        first = trace.Writer(tmp_path, a_report(), 0)
        first.write(0, *values_of(FILTERS, 1))
        second = trace.Writer(tmp_path, a_report(), 0)
        second.write(0, *values_of(FILTERS, 2))
        first.write(10, *values_of(FILTERS, 3))
        assert_holds(second.path, FILTERS, {0: 2})
        assert_holds(first.path, FILTERS, {0: 1, 10: 3})

    def test_who_goes_on_in_a_file_keeps_it(self, tmp_path):
        trace.Writer(tmp_path, a_report(), 0).write(10, *values_of(FILTERS, 1))
        writer = trace.Writer(tmp_path, a_report(), 10)
        gc.collect()  # of what it read the file with, nothing gives the lock up

        def another():
            path = trace.Writer(tmp_path, a_report(), 10).path
            (tmp_path / "another").write_text(str(path))

        os.waitpid(forked(another), 0)
        assert (tmp_path / "another").read_text() != str(writer.path)

    def test_many_at_once_have_a_file_each_and_the_first_stays_whole(self, tmp_path):
        first = trace.Writer(tmp_path, a_report(), 0)
        first.write(0, *values_of(FILTERS, 0))

        def write_as(number):
            writer = trace.Writer(tmp_path, a_report(), 1)  # as a run that resumes
            for i in range(10, 60, 10):
                writer.write(i, *values_of(FILTERS, 100 * number + i))

        for child in [forked(lambda n=n: write_as(n)) for n in range(1, 5)]:
            os.waitpid(child, 0)
        assert_holds(first.path, FILTERS, {0: 0})
        found = {}
        for path in trace.files_of(tmp_path)[1:]:
            got = trace.read(path)
            assert got.iterations.tolist() == [10, 20, 30, 40, 50]
            found[path] = [tuple(row[:3].tolist()) for row in got.gamma]
        want = [
            [tuple(values_of(FILTERS, 100 * n + i)[0][:3].tolist()) for i in range(10, 60, 10)]
            for n in range(1, 5)
        ]
        assert all(rows in want for rows in found.values())
        assert found

    def test_a_file_system_without_locks(self, tmp_path, monkeypatch):
        def no_locks(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(trace.fcntl, "lockf", no_locks)
        self.test_the_one_that_comes_second_is_told_and_the_file_stays_whole(tmp_path)

    def test_a_file_that_was_removed_is_said(self, tmp_path):
        writer = trace.Writer(tmp_path, a_report(), 0)
        writer.write(0, *values_of(FILTERS, 0))
        writer.path.unlink()
        with pytest.raises(trace.TraceError, match="was changed by something else"):
            writer.write(1, *values_of(FILTERS, 1))
