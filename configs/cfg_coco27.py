# COCO-27: 5000 images of val2017, the 27 supercategories of COCO-Stuff.
# Published: nothing of this protocol, with words, for SFP or its peers.
#     CONFIG=configs/cfg_coco27.py WORK_DIR=work/coco27 sh test.sh
# Work on unsupervised segmentation evaluates a part of val2017: give its list of images as
# test_dataloader.dataset.ann_file. Here a class is found by the names of its members (docs/data.md).

_base_ = "./base_config.py"

model = dict(
    classes="{{ fileDirname }}/cls_coco27.txt",
)

test_dataloader = dict(
    dataset=dict(
        type="COCOCoarse27Dataset",
        data_root="{{$DATA_ROOT:data}}/coco_stuff164k",
        data_prefix=dict(img_path="images/val2017", seg_map_path="annotations/val2017"),
    ),
)
