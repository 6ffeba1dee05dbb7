# CLIPtrase's own protocol, whose numbers are not comparable with others: the centre square of each
# image, of 224 pixels (tables 2, 4, 5 and 6 of its paper) or 336 (tables 1, 3 and 7), as one window;
# ignored pixels count as background if the vocabulary has one. Set BENCHMARK and SIZE:
#     CONFIG=configs/protocol_cliptrase.py WORK_DIR=work/protocol_cliptrase sh test.sh
#     BENCHMARK=ade20k SIZE=224 sfp eval protocol_cliptrase --method sclip
#     BENCHMARK=ade20k SIZE=224 sfp ablate protocol_cliptrase --study cliptrase
# The method is the released one, at 336 pixels with eps=1.1 and min_samples=7 (the paper says 0.7 and 3
# for all its results). The words are those of cfg_<BENCHMARK>.py: our sources have neither CLIPtrase's
# class names nor its background prompts, 33 on VOC21.

_base_ = "./cfg_{{$BENCHMARK:voc21}}.py"

benchmark = "{{$BENCHMARK:voc21}}"
size = int("{{$SIZE:336}}")

model = dict(
    method=dict(
        _delete_=True,
        type="cliptrase",
        eps=1.1 if size == 336 else 0.7,
        min_samples=7 if size == 336 else 3,
        cls_logits=benchmark == "voc20",
    ),
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
