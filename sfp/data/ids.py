"""The meaning of the numbers in label maps, as published by the datasets.

COCO's category ids and their supercategories are those of its annotation files (Lin et al. 2014; Caesar
et al. 2018, COCO-Stuff), Cityscapes' names, ids and colours those of cityscapesScripts' labels.py
(Cordts et al. 2016), Pascal Context's those of its labels.txt (Mottaghi et al. 2014).
"""

from __future__ import annotations

# COCO planned 91 object classes and annotated 80: these category ids do not occur.
COCO_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
# A pixel of stuffthingmaps is its category id minus 1; class k of the 171 is the k-th id that occurs.
COCO_STUFF_PIXELS = tuple(i - 1 for i in range(1, 183) if i not in COCO_UNUSED)

# The 27 supercategories of COCO-Stuff with their members, spelled as mmseg spells the 171 classes.
# Things come first, then stuff; that order is ours, since the label maps are made here.
COCO_COARSE: dict[str, tuple[str, ...]] = {
    name: tuple(members.split(", "))
    for name, members in {
        "electronic": "tv, laptop, mouse, remote, keyboard, cell phone",
        "appliance": "microwave, oven, toaster, sink, refrigerator",
        "food": "banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake",
        "furniture": "chair, couch, potted plant, bed, dining table, toilet",
        "indoor": "book, clock, vase, scissors, teddy bear, hair drier, toothbrush",
        "kitchen": "bottle, wine glass, cup, fork, knife, spoon, bowl",
        "accessory": "backpack, umbrella, handbag, tie, suitcase",
        "animal": "bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe",
        "outdoor": "traffic light, fire hydrant, stop sign, parking meter, bench",
        "person": "person",
        "sports": "frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, "
        "skateboard, surfboard, tennis racket",
        "vehicle": "bicycle, car, motorcycle, airplane, bus, train, truck, boat",
        "ceiling": "ceiling-other, ceiling-tile",
        "floor": "carpet, floor-marble, floor-other, floor-stone, floor-tile, floor-wood",
        "food-stuff": "food-other, fruit, salad, vegetable",
        "furniture-stuff": "cabinet, counter, cupboard, desk-stuff, door-stuff, furniture-other, "
        "light, mirror-stuff, shelf, stairs, table",
        "raw-material": "cardboard, metal, paper, plastic",
        "textile": "banner, blanket, cloth, clothes, curtain, mat, napkin, pillow, rug, "
        "textile-other, towel",
        "wall": "wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood",
        "window": "window-blind, window-other",
        "building": "bridge, building-other, house, roof, skyscraper, tent",
        "ground": "dirt, gravel, ground-other, mud, pavement, platform, playingfield, railroad, road, "
        "sand, snow",
        "plant": "branch, bush, flower, grass, leaves, moss, plant-other, straw, tree",
        "sky": "clouds, sky-other",
        "solid": "hill, mountain, rock, solid-other, stone, wood",
        "structural": "cage, fence, net, railing, structural-other",
        "water": "fog, river, sea, water-other, waterdrops",
    }.items()
}

CITYSCAPES_FIRST = 7  # ids 0 to 6 are void; 7 to 33 are these
CITYSCAPES_27: dict[str, list[int]] = {  # and their colours
    "road": [128, 64, 128],
    "sidewalk": [244, 35, 232],
    "parking": [250, 170, 160],
    "rail track": [230, 150, 140],
    "building": [70, 70, 70],
    "wall": [102, 102, 156],
    "fence": [190, 153, 153],
    "guard rail": [180, 165, 180],
    "bridge": [150, 100, 100],
    "tunnel": [150, 120, 90],
    "pole": [153, 153, 153],
    "polegroup": [153, 153, 153],
    "traffic light": [250, 170, 30],
    "traffic sign": [220, 220, 0],
    "vegetation": [107, 142, 35],
    "terrain": [152, 251, 152],
    "sky": [70, 130, 180],
    "person": [220, 20, 60],
    "rider": [255, 0, 0],
    "car": [0, 0, 142],
    "truck": [0, 0, 70],
    "bus": [0, 60, 100],
    "caravan": [0, 0, 90],
    "trailer": [0, 0, 110],
    "train": [0, 80, 100],
    "motorcycle": [0, 0, 230],
    "bicycle": [119, 11, 32],
}

# Numbers of the 59 frequent classes among the 459, in alphabetical order, like mmseg's.
CONTEXT_59 = (
    *(2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113),
    *(
        115,
        144,
        158,
        159,
        162,
        187,
        189,
        207,
        220,
        232,
        258,
        259,
        260,
        284,
        295,
        296,
        308,
        324,
        326,
    ),
    *(347, 349, 354, 355, 360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458),
)
