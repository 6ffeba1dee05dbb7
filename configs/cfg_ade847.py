# ADE20K-847, the full ADE20K: 2000 images of validation, 847 classes.
# Published: nothing with this protocol for SFP or similar methods; CLIPtrase has 6.31 mIoU on centre
# crops of 224 pixels (table 6) and 5.89 on those of 336 (tables 1 and 7).
#     CONFIG=configs/cfg_ade847.py WORK_DIR=work/ade847 sh test.sh
# Names and label maps: `sfp data prepare ade847` (docs/data.md). Labels keep the size of their image;
# papers that prepare the data as MaskFormer does evaluate copies with a short side of 512.

_base_ = "./base_config.py"

model = dict(
    classes="{{$DATA_ROOT:data}}/ADE20K_2021_17_01/cls_ade847.txt",
)

test_evaluator = dict(ignore_index=65535)  # labels have 16 bits

test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 384), keep_ratio=True),
    dict(type="LoadLabels"),  # after Resize: labels keep their size
    dict(type="PackSegInputs"),
]

test_dataloader = dict(
    dataset=dict(
        type="ADE20K847Dataset",
        data_root="{{$DATA_ROOT:data}}/ADE20K_2021_17_01",
        names_file="cls_ade847.txt",
        data_prefix=dict(
            img_path="images/ADE/validation", seg_map_path="annotations847/validation"
        ),
        pipeline=test_pipeline,
    ),
)
