"""CIFAR-10's binary files: read, checked, fetched, subset, shuffled, augmented."""

import hashlib
import os
import tarfile

import numpy as np
import pytest
import torch

from studies.cifar import data
from studies.cifar.data import Batches, DataError, Split
from tests.helpers.cifar_files import write_cifar


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_cifar(tmp_path_factory.mktemp("cifar"))


def test_record_is_label_then_red_green_blue_row_by_row(root):
    path = root / data.FOLDER / "test_batch.bin"
    raw = path.read_bytes()
    split = data.load(root, train=False)
    assert split.images.shape == (10_000, 3, 32, 32)
    assert split.images.dtype == torch.uint8
    record, channel, row, column = 4321, 1, 7, 30
    start = record * 3073
    assert split.labels[record] == raw[start]
    at = start + 1 + channel * 1024 + row * 32 + column
    assert split.images[record, channel, row, column] == raw[at]


def test_training_images_are_the_five_batches_in_order(root):
    split = data.load(root, train=True)
    assert len(split) == 50_000
    raw = (root / data.FOLDER / "data_batch_3.bin").read_bytes()
    assert split.labels[20_001] == raw[3073]
    # The folder of the files itself will do as well.
    assert torch.equal(data.load(root / data.FOLDER, train=True).labels, split.labels)


def test_missing_file_is_named_with_its_size(tmp_path):
    with pytest.raises(DataError, match=r"data_batch_1.bin: no such file \(of 30,730,000 bytes\)"):
        data.load(tmp_path, train=True)


def test_truncated_file_is_named_with_both_sizes(root, tmp_path):
    copy = write_cifar(tmp_path)
    path = copy / data.FOLDER / "test_batch.bin"
    path.unlink()
    path.write_bytes(b"\0" * 1000)
    with pytest.raises(DataError, match=r"test_batch.bin: has 1,000 bytes, but .* 30,730,000"):
        data.check_files(copy)


def test_file_of_something_else_is_refused(tmp_path):
    copy = write_cifar(tmp_path)
    path = copy / data.FOLDER / "test_batch.bin"
    path.unlink()
    path.write_bytes(b"\xff" * data.FILE_BYTES)
    with pytest.raises(DataError, match="label of 255"):
        data.load(copy, train=False)


def test_fingerprint_sees_one_byte(root, tmp_path):
    copy = write_cifar(tmp_path)
    assert data.fingerprint(copy) == data.fingerprint(root)
    path = copy / data.FOLDER / "test_batch.bin"
    raw = bytearray(path.read_bytes())
    raw[5000] ^= 1
    path.unlink()
    path.write_bytes(raw)
    assert data.fingerprint(copy) != data.fingerprint(root)


@pytest.fixture
def archive(tmp_path_factory, monkeypatch):
    """The URL of an archive like the official one, of 10 records a file, and its checksum."""
    monkeypatch.setattr(data, "RECORDS", 10)
    monkeypatch.setattr(data, "FILE_BYTES", 30_730)
    folder = tmp_path_factory.mktemp("server")
    (folder / data.FOLDER).mkdir()
    for i, name in enumerate((*data.TRAIN_FILES, *data.TEST_FILES)):
        (folder / data.FOLDER / name).write_bytes(bytes([i]) * 30_730)
    path = folder / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder / data.FOLDER, data.FOLDER)
    return path.as_uri(), hashlib.md5(path.read_bytes()).hexdigest()


def test_download_unpacks_what_has_the_checksum(archive, tmp_path):
    data.download(tmp_path / "new", *archive)
    assert data.load(tmp_path / "new", train=True).labels.tolist() == [
        i for i in range(5) for _ in range(10)
    ]
    assert data.load(tmp_path / "new", train=False).images.eq(5).all()
    # Again: nothing is fetched.
    data.download(tmp_path / "new", "file:///nowhere", "no")


def test_wrong_checksum_leaves_nothing(archive, tmp_path):
    with pytest.raises(DataError, match=f"checksum {archive[1]} instead of {'0' * 32}"):
        data.download(tmp_path, archive[0], "0" * 32)
    assert list(tmp_path.iterdir()) == []


def test_no_connection_is_one_line(tmp_path):
    with pytest.raises(DataError, match="could not be downloaded"):
        data.download(tmp_path, (tmp_path / "nothing.tar.gz").as_uri())
    assert list(tmp_path.iterdir()) == []


def test_download_overwrites_no_damaged_file(archive, tmp_path):
    folder = tmp_path / data.FOLDER
    folder.mkdir()
    (folder / "data_batch_1.bin").write_bytes(b"mine")
    with pytest.raises(DataError, match="has 4 bytes"):
        data.download(tmp_path, *archive)
    assert (folder / "data_batch_1.bin").read_bytes() == b"mine"


def test_no_permission_is_one_line(archive, tmp_path, monkeypatch):
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
    else:  # root may write anywhere, so say what another user would be told

        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(data.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(DataError, match="no permission to write there; name another folder"):
        data.download(tmp_path, *archive)


def labelled(n, classes=10):
    images = torch.arange(n).remainder(256).byte().view(n, 1, 1, 1).expand(n, 3, 32, 32)
    return Split(images.contiguous(), torch.arange(n) % classes)


def test_subset_is_balanced_and_fixed_by_the_seed():
    split = labelled(1000)
    subset = data.balanced_subset(split, 100, seed=3)
    assert torch.bincount(subset.labels).tolist() == [10] * 10
    again = data.balanced_subset(split, 100, seed=3)
    other = data.balanced_subset(split, 100, seed=4)
    assert torch.equal(subset.images, again.images)
    assert not torch.equal(subset.images, other.images)
    assert len(subset.images[:, 0, 0, 0].unique()) > 70  # of 256 values: images differ
    with pytest.raises(DataError, match="multiple of 10"):
        data.balanced_subset(split, 101, seed=0)
    with pytest.raises(DataError, match="only 100 of class 0"):
        data.balanced_subset(split, 1010, seed=0)


def test_random_labels_are_the_labels_in_another_order():
    split = labelled(1000)
    shuffled = data.random_labels(split, 0)
    assert torch.bincount(shuffled.labels).tolist() == [100] * 10
    assert torch.equal(shuffled.images, split.images)
    assert torch.equal(shuffled.labels, data.random_labels(split, 0).labels)
    # Agreement by chance alone: 100 +- 9.5 of 1000.
    assert 60 < (shuffled.labels == split.labels).sum() < 140


def test_every_crop_is_of_the_padded_image_or_its_mirror():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.arange(20) % 10)
    batches = Batches(split, 20, 3, seed=0)
    grey = np.round(data.MEAN).astype(np.uint8).reshape(3, 1, 1)
    mean = np.float32(data.MEAN).reshape(3, 1, 1)
    std = np.float32(data.STD).reshape(3, 1, 1)
    seen = set()
    for iteration in range(3):
        batch = batches[iteration]
        for image, label in zip(batch["inputs"].numpy(), batch["labels"], strict=True):
            matches = []
            for source in range(20):
                padded = np.broadcast_to(grey, (3, 40, 40)).copy()
                padded[:, 4:36, 4:36] = images[source].numpy()
                if int(split.labels[source]) != int(label):
                    continue
                for top in range(9):
                    for left in range(9):
                        for flip in (1, -1):
                            crop = padded[:, top : top + 32, left : left + 32][:, :, ::flip]
                            if np.allclose(image, (crop - mean) / std, atol=1e-5):
                                matches.append((source, top, left, flip))
            assert len(matches) == 1
            seen.add(matches[0][1:])
    assert len(seen) > 40  # of 162 ways; 60 draws give 50.3 +- 2.5
    assert {flip for _, _, flip in seen} == {1, -1}


def test_an_epoch_sees_each_image_once_and_the_next_in_another_order():
    n = 200
    batches = Batches(labelled(n), 60, 100, seed=1, augment=False)
    assert batches.per_epoch == 3  # the 20 that are left are dropped
    mean, std = data.MEAN[0], data.STD[0]

    def epoch(number):
        values = [batches[number * 3 + i]["inputs"][:, 0, 16, 16] for i in range(3)]
        return (torch.cat(values) * std + mean).round().long().tolist()

    first, second = epoch(0), epoch(1)
    assert len(set(first)) == len(first) == 180
    assert first != second


def test_a_batch_depends_on_seed_and_iteration_alone():
    split = labelled(200)
    one, two = Batches(split, 50, 100, seed=1), Batches(split, 50, 100, seed=1)
    for i in range(9):
        one[i]
    torch.rand(7)  # the global generator has no say
    torch.testing.assert_close(one[9], two[9], rtol=0, atol=0)
    assert not torch.equal(one[9]["inputs"], Batches(split, 50, 100, seed=2)[9]["inputs"])


def test_batch_larger_than_the_subset_is_refused():
    with pytest.raises(DataError, match="a batch of 201 images cannot be had from 200"):
        Batches(labelled(200), 201, 1, 0)


@pytest.mark.slow
def test_jpeg_copy_has_its_classes(shared_data, tmp_path):
    import runpy
    import sys
    from unittest import mock

    script = shared_data / "unpack_cifar10.py"
    if not script.exists():
        pytest.skip(f"no {script}")
    with mock.patch.object(sys, "argv", [str(script), str(tmp_path)]):
        runpy.run_path(str(script), run_name="__main__")
    for train, each in ((True, 5000), (False, 1000)):
        split = data.load(tmp_path, train)
        assert torch.bincount(split.labels).tolist() == [each] * 10
        mean = split.images.double().mean((0, 2, 3))
        torch.testing.assert_close(mean, torch.tensor(data.MEAN).double(), atol=1.5, rtol=0)
        std = split.images.double().transpose(0, 1).flatten(1).std(1)
        torch.testing.assert_close(std, torch.tensor(data.STD).double(), atol=1.5, rtol=0)
