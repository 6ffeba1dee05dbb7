# Cityscapes-27: 500 images of val, all 27 classes that are not void.
# Published: nothing with words and this protocol for SFP or similar methods.
#     CONFIG=configs/cfg_city_scapes27.py WORK_DIR=work/city_scapes27 sh test.sh

_base_ = "./base_config.py"

model = dict(
    classes="{{ fileDirname }}/cls_city_scapes27.txt",
)

test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 560), keep_ratio=True),
    dict(type="LoadAnnotations"),  # after Resize: labels keep their size
    dict(type="PackSegInputs"),
]

test_dataloader = dict(
    dataset=dict(
        type="Cityscapes27Dataset",
        data_root="{{$DATA_ROOT:data}}/cityscapes",
        data_prefix=dict(img_path="leftImg8bit/val", seg_map_path="gtFine/val"),
        pipeline=test_pipeline,
    ),
)
