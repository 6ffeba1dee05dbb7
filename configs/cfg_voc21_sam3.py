# Pascal VOC 2012 with SAM 3 instead of CLIP (sfp[guides]); facebook/sam3 is gated on the Hub.
# Published for SegEarth-OV3: 79.8 mIoU (in another method's paper); ActiveSAM 83.8, with
# model.method.type=activesam and without its dataset.
#     CONFIG=configs/cfg_voc21_sam3.py WORK_DIR=work/voc21_sam3 sh test.sh

_base_ = "./cfg_voc21.py"

model = dict(
    weights="none",
    method=dict(_delete_=True, type="segearth_ov3", dataset="voc21"),
    guides=dict(sam3=dict(type="sam3", model="facebook/sam3")),
    prob_thd=0.4,  # of scores, not of probabilities
    area_thd=None,
)

test_pipeline = [  # images keep their size: SAM 3 squeezes them to its own
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
