# COCO-27: 5000 images of val2017, the 27 supercategories of COCO-Stuff.
# Published: nothing with words and this protocol for SFP or similar methods.
#     CONFIG=configs/cfg_coco27.py WORK_DIR=work/coco27 sh test.sh
# Papers on unsupervised segmentation evaluate a subset of val2017: give its list of images as
# test_dataloader.dataset.ann_file. The queries of a class are the names of its members (docs/data.md).

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
