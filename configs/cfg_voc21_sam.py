# Pascal VOC 2012 with labels that follow SAM's masks, prompted by CLIPtrase's clusters (sfp[sam]).
# Published: nothing with these settings; CLIPtrase has 57.06 mIoU with SAM on centre crops (table 3).
#     CONFIG=configs/cfg_voc21_sam.py WORK_DIR=work/voc21_sam sh test.sh

_base_ = "./cfg_voc21.py"

model = dict(
    method=dict(_delete_=True, type="cliptrase"),
    masks=dict(  # knobs of sfp.masks.MaskVote
        # SAM 2: facebook/sam2.1-hiera-tiny
        propose=dict(type="sam", model="facebook/sam-vit-base"),
        points=dict(type="cluster_points", affinity=dict(type="head_cosine", subtract_cls=True)),
        vote="mode",
    ),
)

test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="KeepImage"),  # SAM sees the image before it is resized
    dict(type="Resize", scale=(2048, 336), keep_ratio=True),
    dict(type="LoadAnnotations"),  # after Resize: labels keep their size
    dict(
        type="PackSegInputs",
        meta_keys=("img_path", "seg_map_path", "ori_shape", "img_shape", "full_image"),
    ),
]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
