# ADE20K: 2000 images of validation, 150 classes.
# Published for SFP: 20.8 mIoU (poster); 18.1 when PEARL's authors ran it (settings unknown).
#     CONFIG=configs/cfg_ade20k.py WORK_DIR=work/ade20k sh test.sh
# The short side is 384; most other methods report ADE20K at 336.

_base_ = "./base_config.py"

model = dict(
    classes="{{ fileDirname }}/cls_ade20k.txt",
)

test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 384), keep_ratio=True),
    dict(type="LoadAnnotations"),  # after Resize: labels keep their size
    dict(type="PackSegInputs"),
]

test_dataloader = dict(
    dataset=dict(
        type="ADE20K150Dataset",
        data_root="{{$DATA_ROOT:data}}/ade/ADEChallengeData2016",
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=test_pipeline,
    ),
)
