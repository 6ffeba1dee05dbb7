# Cityscapes: 500 images of val, 19 classes.
# Published for SFP: 41.1 mIoU (poster); 34.1 when PEARL's authors ran it (settings unknown).
#     CONFIG=configs/cfg_city_scapes.py WORK_DIR=work/city_scapes sh test.sh

_base_ = "./base_config.py"

model = dict(
    classes="{{ fileDirname }}/cls_city_scapes.txt",
)

test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 560), keep_ratio=True),
    dict(type="LoadAnnotations"),  # after Resize: labels keep their size
    dict(type="PackSegInputs"),
]

test_dataloader = dict(
    dataset=dict(
        type="Cityscapes19Dataset",
        data_root="{{$DATA_ROOT:data}}/cityscapes",
        data_prefix=dict(img_path="leftImg8bit/val", seg_map_path="gtFine/val"),
        pipeline=test_pipeline,
    ),
)
