# Pascal Context with background (Context60): 5104 images of val, 60 classes.
# Published for SFP: 37.2 mIoU (poster); 32.3 when PEARL's authors ran it (settings unknown).
#     CONFIG=configs/cfg_context60.py WORK_DIR=work/context60 sh test.sh

_base_ = "./base_config.py"

model = dict(
    classes="{{ fileDirname }}/cls_context60.txt",
    prob_thd=0.15,
)

test_dataloader = dict(
    dataset=dict(
        type="PascalContext60Dataset",
        data_root="{{$DATA_ROOT:data}}/VOCdevkit/VOC2010",
        ann_file="ImageSets/SegmentationContext/val.txt",
        data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClassContext"),
    ),
)
