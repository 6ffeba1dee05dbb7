# COCO-Stuff 164k: 5000 images of val2017, 171 classes.
# Published for SFP: 26.4 mIoU (poster); 24.0 when PEARL's authors ran it (settings unknown).
#     CONFIG=configs/cfg_coco_stuff164k.py WORK_DIR=work/coco_stuff164k sh test.sh

_base_ = "./base_config.py"

model = dict(
    classes="{{ fileDirname }}/cls_coco_stuff.txt",
)

test_dataloader = dict(
    dataset=dict(
        type="COCOStuff164kDataset",
        data_root="{{$DATA_ROOT:data}}/coco_stuff164k",
        data_prefix=dict(img_path="images/val2017", seg_map_path="annotations/val2017"),
    ),
)
