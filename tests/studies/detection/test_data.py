"""BCCD's images, boxes and batches."""

import json

import pytest
import torch

from psbn_mmdet.ap.coco_files import read_annotations as read_coco
from studies.detection import data
from studies.runs import RunError
from tests.helpers.smears import write_smears


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_smears(tmp_path_factory.mktemp("smears") / "data")


def test_boxes_follow_the_image_to_its_new_size(root):
    # 128x96 -> 64x24: x halves, y goes to a quarter.
    images = data.load(root, data.TRAIN, (64, 24))
    assert images.pixels.shape == (6, 3, 24, 64)
    assert images.pixels.dtype == torch.uint8
    boxes = json.loads((root / "annotations" / "train.json").read_text())["annotations"]
    x, y, w, h = boxes[0]["bbox"]
    wanted = torch.tensor([x / 2, y / 4, (x + w) / 2, (y + h) / 4])
    torch.testing.assert_close(images.boxes[0][0], wanted)
    assert images.labels[0].tolist() == [0, 1]
    assert images.originals[0] == (96, 128)


def test_test_set_is_validation_and_test_images_with_ids_of_their_own(root, tmp_path):
    path = tmp_path / "annotations.json"
    data.write_test_annotations(root, path)
    merged = json.loads(path.read_text())
    assert [image["file_name"] for image in merged["images"]] == [
        "val_1.png", "val_2.png", "val_3.png", "test_1.png", "test_2.png",
    ]  # fmt: skip
    assert [image["id"] for image in merged["images"]] == [1, 2, 3, 4, 5]
    assert [box["id"] for box in merged["annotations"]] == list(range(1, 11))
    assert [box["image_id"] for box in merged["annotations"]] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert len(read_coco(path).image_ids) == 5
    images = data.load(root, data.TEST, (64, 48))
    assert images.ids == (1, 2, 3, 4, 5)


def test_count_takes_the_same_images_as_it_takes_annotations(root, tmp_path):
    path = tmp_path / "annotations.json"
    data.write_test_annotations(root, path, 4)
    merged = json.loads(path.read_text())
    assert [image["id"] for image in merged["images"]] == [1, 2, 3, 4]
    assert {box["image_id"] for box in merged["annotations"]} == {1, 2, 3, 4}
    assert data.load(root, data.TEST, (64, 48), 4).ids == (1, 2, 3, 4)


@pytest.mark.parametrize("left_right", [False, True])
@pytest.mark.parametrize("top_bottom", [False, True])
def test_boxes_are_mirrored_with_their_image(left_right, top_bottom):
    # The one bright rectangle is what its box says, mirrored or not.
    pixels = torch.zeros(3, 20, 30, dtype=torch.uint8)
    pixels[:, 4:9, 10:22] = 255
    boxes = torch.tensor([[10.0, 4.0, 22.0, 9.0]])
    pixels, boxes = data.flipped(pixels, boxes, left_right, top_bottom)
    x1, y1, x2, y2 = boxes[0].int().tolist()
    assert (pixels[:, y1:y2, x1:x2] == 255).all()
    assert (pixels == 255).sum() == 3 * 5 * 12


def test_every_epoch_shows_every_image_once_and_a_batch_follows_from_its_number(root):
    images = data.load(root, data.TRAIN, (64, 48))
    batches = data.Batches(images, 2, 12, seed=3)
    for epoch in range(2):
        shown = [s.img_id for i in range(3) for s in batches[3 * epoch + i]["data_samples"]]
        assert sorted(shown) == list(images.ids)
    again = data.Batches(images, 2, 12, seed=3)[5]
    for one, other in zip(batches[5]["inputs"], again["inputs"], strict=True):
        assert torch.equal(one, other)
    orders = {
        tuple(
            s.img_id for i in range(3) for s in data.Batches(images, 2, 3, seed)[i]["data_samples"]
        )
        for seed in range(4)
    }
    assert len(orders) > 1
    assert len(data.Batches(images, 4, 9, seed=0)[0]["inputs"]) == 4


def test_loading_changes_no_pixel_beside_averaging(root):
    # Halving by area averaging is the mean of 2x2 pixels, to rounding.
    whole = data.load(root, data.TRAIN, (128, 96), 1).pixels[0].double()
    half = data.load(root, data.TRAIN, (64, 48), 1).pixels[0].double()
    mean = whole.reshape(3, 48, 2, 64, 2).mean((2, 4))
    assert (half - mean).abs().max() <= 0.5


def test_fingerprint_sees_one_byte(root, tmp_path):
    copy = write_smears(tmp_path / "copy")
    assert data.fingerprint(copy) == data.fingerprint(root)
    path = copy / "images" / "test_2.png"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    assert data.fingerprint(copy) != data.fingerprint(root)


def test_bad_data_is_one_line(root, tmp_path):
    with pytest.raises(RunError, match=r"annotations/train.json: no such file.*--data-root"):
        data.load(tmp_path, data.TRAIN, (64, 48))
    copy = write_smears(tmp_path / "copy")
    (copy / "images" / "train_2.png").write_bytes(b"no image")
    with pytest.raises(RunError, match=r"train_2.png: is no image"):
        data.load(copy, data.TRAIN, (64, 48))
    (copy / "images" / "train_2.png").unlink()
    with pytest.raises(RunError, match=r"train_2.png: no such image"):
        data.fingerprint(copy)
    (copy / "annotations" / "val.json").write_text('{"images": []}')
    with pytest.raises(RunError, match=r"val.json: is not in COCO's format"):
        data.load(copy, data.TEST, (64, 48))
    with pytest.raises(RunError, match="batch of 7 images cannot be had from 6"):
        data.Batches(data.load(root, data.TRAIN, (64, 48)), 7, 1, 0)
