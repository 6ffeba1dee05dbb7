# Pascal Context with all its classes (Context459): 5104 images of val, 459 classes.
# Published: nothing with this protocol for SFP or similar methods; CLIPtrase has 9.36 mIoU on centre
# crops of 224 pixels (table 6), and 9.95 (table 1) or 10.11 (table 7) on those of 336.
#     CONFIG=configs/cfg_context459.py WORK_DIR=work/context459 sh test.sh
# Names and label maps: `sfp data prepare context459` (docs/data.md).

_base_ = "./base_config.py"

model = dict(
    classes="{{$DATA_ROOT:data}}/VOCdevkit/VOC2010/cls_context459.txt",
)

test_evaluator = dict(ignore_index=65535)  # labels have 16 bits

test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 336), keep_ratio=True),
    dict(type="LoadLabels"),  # after Resize: labels keep their size
    dict(type="PackSegInputs"),
]

test_dataloader = dict(
    dataset=dict(
        type="PascalContext459Dataset",
        data_root="{{$DATA_ROOT:data}}/VOCdevkit/VOC2010",
        ann_file="ImageSets/SegmentationContext/val.txt",
        names_file="cls_context459.txt",
        data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClassContext459"),
        pipeline=test_pipeline,
    ),
)
