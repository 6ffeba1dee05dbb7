# Pascal Context without background (Context59): 5104 images of val, 59 classes.
# Published for SFP: 39.9 mIoU (poster); 36.0 when PEARL's authors ran it (settings unknown).
#     CONFIG=configs/cfg_context59.py WORK_DIR=work/context59 sh test.sh

_base_ = "./base_config.py"

model = dict(
    classes="{{ fileDirname }}/cls_context59.txt",
)

test_dataloader = dict(
    dataset=dict(
        type="PascalContext59Dataset",
        data_root="{{$DATA_ROOT:data}}/VOCdevkit/VOC2010",
        ann_file="ImageSets/SegmentationContext/val.txt",
        data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClassContext"),
    ),
)
