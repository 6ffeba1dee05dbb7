# COCO-Object: 5000 images of val2017, 80 things and background.
# Published for SFP: 37.9 mIoU (poster); 32.1 when PEARL's authors ran it (settings unknown).
#     CONFIG=configs/cfg_coco_object.py WORK_DIR=work/coco_object sh test.sh
# The label maps come from `sfp data prepare coco_object` (docs/data.md).

_base_ = "./base_config.py"

model = dict(
    classes="{{ fileDirname }}/cls_coco_object.txt",
    logit_scale=55.0,
    prob_thd=0.35,
)

test_dataloader = dict(
    dataset=dict(
        type="COCOObjectDataset",
        data_root="{{$DATA_ROOT:data}}/coco_object",
        data_prefix=dict(img_path="images/val2017", seg_map_path="annotations/val2017"),
    ),
)
