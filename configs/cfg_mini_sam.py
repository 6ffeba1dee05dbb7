# The mini world with labels that follow SAM's masks, prompted by CLIPtrase's clusters. SAM needs
# pretrained weights (downloaded from the Hugging Face hub on first use, or a folder) and the extra
# sfp[sam]; docs/applications.md shows how to try it with random weights.
#     CONFIG=configs/cfg_mini_sam.py WORK_DIR=work/mini_sam sh test.sh

_base_ = "./cfg_mini.py"

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
    dict(type="Resize", scale=(2048, 224), keep_ratio=True),
    dict(type="LoadAnnotations"),  # after Resize: labels keep their size
    dict(
        type="PackSegInputs",
        meta_keys=("img_path", "seg_map_path", "ori_shape", "img_shape", "full_image"),
    ),
]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
