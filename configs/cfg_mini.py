# The mini world: 200 drawn scenes, 18 classes, and a CLIP trained on such scenes, both shipped with the
# package; the scenes are rendered on first use. It says nothing about the real benchmarks.
#     CONFIG=configs/cfg_mini.py WORK_DIR=work/mini sh test.sh

_base_ = "./base_config.py"

model = dict(
    weights="mini",
    classes="{{ fileDirname }}/cls_mini.txt",
)

test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 224), keep_ratio=True),
    dict(type="LoadAnnotations"),  # after Resize: labels keep their size
    dict(type="PackSegInputs"),
]

test_dataloader = dict(
    dataset=dict(
        type="MiniSceneDataset",
        scenes=200,
        data_prefix=dict(img_path="images", seg_map_path="labels"),
        pipeline=test_pipeline,
    ),
)
