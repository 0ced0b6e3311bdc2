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

_STUFF = """
92 banner, 93 blanket, 95 bridge, 100 cardboard, 107 counter, 109 curtain, 112 door-stuff, 118 floor-wood, 119 flower,
122 fruit, 125 gravel, 128 house, 130 light, 133 mirror-stuff, 138 net, 141 pillow, 144 platform, 145 playingfield,
147 railroad, 148 river, 149 road, 151 roof, 154 sand, 155 sea, 156 shelf, 159 snow, 161 stairs, 166 tent, 168 towel,
171 wall-brick, 175 wall-stone, 176 wall-tile, 177 wall-wood, 178 water-other, 180 window-blind, 181 window-other,
184 tree-merged, 185 fence-merged, 186 ceiling-merged, 187 sky-other-merged, 188 cabinet-merged, 189 table-merged,
190 floor-other-merged, 191 pavement-merged, 192 mountain-merged, 193 grass-merged, 194 dirt-merged, 195 paper-merged,
196 food-other-merged, 197 building-other-merged, 198 rock-merged, 199 wall-other-merged, 200 rug-merged
"""

STUFF: dict[int, str] = {int(number): name for number, name in (entry.split() for entry in _STUFF.split(","))}
"""Id to name, of the 53 kinds of stuff that COCO's panoptic annotations have beside these."""
