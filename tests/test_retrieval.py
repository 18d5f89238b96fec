"""Recall at k on cases small enough to count by hand."""

import pytest
import torch
from torch.nn import functional as F

from vismodal.contrastive.retrieval import ranks, recall
from vismodal.errors import InputError


def unit(degrees: list[float]) -> torch.Tensor:
    angle = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angle.cos(), angle.sin()], 1)


# three pictures at 0, 60 and 120 degrees; five captions, two of picture 0, two of picture 1, one of picture 2
IMAGES = unit([0, 60, 120])
TEXTS = unit([10, 50, 55, 95, 61])
IMAGE_OF = torch.tensor([0, 0, 1, 1, 2])


def test_by_hand() -> None:
    of_text, of_image = ranks(IMAGES, TEXTS, IMAGE_OF)
    # 10: own 10 away, first. 50: own 50, picture 1 at 10: second. 55: own 5: first. 95: own 35, picture 2 at 25: second
    # 61: own 59, picture 1 at 1, picture 0 at 61: second
    assert of_text.tolist() == [0, 1, 0, 1, 1]
    # picture 0: its 10 is the nearest. Picture 1: 61 at 1 is nearer than its 55 at 5: second, whatever its other.
    # Picture 2: own 61 at 59 away; nearer are 95 (25): second
    assert of_image.tolist() == [0, 1, 1]
    found = recall(IMAGES, TEXTS, IMAGE_OF, ks=(1, 2, 10))
    assert found == {
        "text to image R@1": pytest.approx(2 / 5),
        "text to image R@2": 1.0,
        "text to image R@10": 1.0,
        "image to text R@1": pytest.approx(1 / 3),
        "image to text R@2": 1.0,
        "image to text R@10": 1.0,
    }


def test_other_captions_of_the_same_picture_are_not_wrong() -> None:
    """Both captions of picture 0 beat that of picture 1: its best one still comes first."""
    _, of_image = ranks(unit([0, 90]), unit([1, 2, 30]), torch.tensor([0, 0, 1]))
    assert of_image.tolist() == [0, 0]


def test_the_order_of_the_captions_does_not_matter() -> None:
    order = torch.tensor([4, 2, 0, 3, 1])
    of_text, of_image = ranks(IMAGES, TEXTS, IMAGE_OF)
    text, image = ranks(IMAGES, TEXTS[order], IMAGE_OF[order])
    assert torch.equal(text, of_text[order]) and torch.equal(image, of_image)


def test_features_that_tell_nothing_apart_find_nothing() -> None:
    same = F.normalize(torch.ones(4, 3), dim=-1)
    assert recall(same, same, torch.arange(4), ks=(1, 3)) == dict.fromkeys(
        ("text to image R@1", "text to image R@3", "image to text R@1", "image to text R@3"), 0.0
    )


def test_many_rows_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(n, 5), dim=-1) for n in (7, 20))
    image_of = torch.cat([torch.arange(7), torch.randint(7, (13,))])
    whole = ranks(images, texts, image_of)
    monkeypatch.setattr("vismodal.contrastive.retrieval._ROWS", 3)
    assert all(torch.equal(a, b) for a, b in zip(whole, ranks(images, texts, image_of), strict=True))
    similar = texts @ images.T
    assert whole[0].tolist() == [int((row > row[i]).sum()) for row, i in zip(similar, image_of, strict=True)]


def test_a_picture_without_caption_is_an_error() -> None:
    with pytest.raises(InputError, match="1 of 3 pictures have no caption"):
        recall(IMAGES, TEXTS[:4], IMAGE_OF[:4])
