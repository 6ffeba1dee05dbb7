# CLIPtrase's own protocol, whose numbers are not comparable with others: the centre square of each
# image, of 224 pixels (tables 2, 4, 5 and 6 of its paper) or 336 (tables 1, 3 and 7), as one window;
# ignored pixels count as background if the vocabulary has one. Set BENCHMARK and SIZE:
#     CONFIG=configs/protocol_cliptrase.py WORK_DIR=work/protocol_cliptrase sh test.sh
#     BENCHMARK=ade20k SIZE=224 sfp eval configs/protocol_cliptrase.py --method sclip

_base_ = "./cfg_{{$BENCHMARK:voc21}}.py"

benchmark = "{{$BENCHMARK:voc21}}"
size = int("{{$SIZE:336}}")

model = dict(
    method=dict(_delete_=True, type="cliptrase", cls_logits=benchmark == "voc20"),
    logit_scale=40.0,
    prob_thd=0.0,
    area_thd=None,
    slide_crop=0,
)
test_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadLabels" if benchmark in ("ade847", "context459") else "LoadAnnotations"),
            dict(
                type="CentreCrop",
                size=size,
                void=0 if benchmark in ("voc21", "context60", "coco_object") else None,
            ),
            dict(type="PackSegInputs"),
        ],
    ),
)
