from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrkit.data.annotations import Annotations, Strings
from detrkit.structures import Category


@pytest.fixture
def make_annotations(tmp_path: Path):
    """A function (count, boxes an image) -> annotations whose images lie in a temporary folder."""

    def make(count=5, each=2, size=(40, 60), suffix="png") -> Annotations:
        rng = np.random.default_rng(count)
        names = [f"{index:03d}.{suffix}" for index in range(count)]
        for name in names:
            pixels = rng.integers(0, 256, (8, 12, 3), np.uint8)
            Image.fromarray(pixels).resize(size[::-1]).save(tmp_path / name)
        low = rng.uniform(0, 0.6, (count * each, 2))
        high = low + rng.uniform(0.1, 0.4, (count * each, 2))
        boxes = np.concatenate([low, high], 1) * (size[1], size[0], size[1], size[0])
        return Annotations(
            root=tmp_path,
            file_names=Strings(names),
            image_ids=np.arange(1, count + 1),
            image_sizes=np.full((count, 2), size, np.int32),
            offsets=np.arange(count + 1, dtype=np.int64) * each,
            boxes=boxes,
            labels=np.arange(count * each) % 3,
            areas=np.prod(boxes[:, 2:] - boxes[:, :2], 1),
            crowd=np.zeros(count * each, bool),
            difficult=np.zeros(count * each, bool),
            categories=tuple(Category(index + 1, name) for index, name in enumerate("abc")),
        )

    return make
