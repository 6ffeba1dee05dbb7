# Pascal VOC 2012 with background (VOC21): 1449 images of val, 21 classes.
# Published for SFP: 63.9 mIoU (poster); 61.4 in the log that comes with the released code, of an
# earlier commit; 56.8 when PEARL's authors ran it (settings unknown).
#     CONFIG=configs/cfg_voc21.py WORK_DIR=work/voc21 sh test.sh

_base_ = "./base_config.py"

model = dict(
    classes="{{ fileDirname }}/cls_voc21.txt",
    logit_scale=50.0,
    prob_thd=0.15,
    area_thd=0.1,
)

test_dataloader = dict(
    dataset=dict(
        type="PascalVOC21Dataset",
        data_root="{{$DATA_ROOT:data}}/VOCdevkit/VOC2012",
        ann_file="ImageSets/Segmentation/val.txt",
        data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
    ),
)
