# Pascal VOC 2012 without background (VOC20): 1449 images of val, 20 classes.
# Published for SFP: 84.5 mIoU (poster); 83.4 when PEARL's authors ran it (settings unknown).
#     CONFIG=configs/cfg_voc20.py WORK_DIR=work/voc20 sh test.sh

_base_ = "./base_config.py"

model = dict(
    classes="{{ fileDirname }}/cls_voc20.txt",
)

test_dataloader = dict(
    dataset=dict(
        type="PascalVOC20Dataset",
        data_root="{{$DATA_ROOT:data}}/VOCdevkit/VOC2012",
        ann_file="ImageSets/Segmentation/val.txt",
        data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
    ),
)
