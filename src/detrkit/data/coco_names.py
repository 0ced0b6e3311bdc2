"""The categories of COCO, which official checkpoints do not hold."""

from __future__ import annotations

_UNUSED = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)

_LISTED = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier,
toothbrush
"""

NAMES: dict[int, str] = dict(
    zip(
        (number for number in range(91) if number not in _UNUSED),
        (" ".join(name.split()) for name in _LISTED.split(",")),
        strict=True,
    )
)
"""Id to name, of the 80 that COCO 2017 annotates."""
