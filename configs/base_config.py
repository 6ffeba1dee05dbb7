# Shared by the configs of all benchmarks: runtime, model and ablation flags.
#
# A config cfg_<dataset>.py adds its data, its vocabulary (cls_<dataset>.txt) and its thresholds.
# Any value can also be set on the command line:
#     sfp eval voc21 --cfg-options model.method.purify=False

default_scope = "mmseg"
custom_imports = dict(imports=["sfp"], allow_failed_imports=False)
launcher = "none"
log_level = "WARNING"  # INFO shows mmengine's log in the terminal
log_processor = dict(by_epoch=False)
load_from = None
resume = False
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
visualizer = dict(
    type="SegLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")], name="visualizer"
)
default_hooks = dict(logger=dict(type="LoggerHook", interval=50))

model = dict(
    type="OpenVocabSegmentor",
    # mean and std, RGB in 0..255, are those of the weights unless given here
    data_preprocessor=dict(type="ImagePreprocessor", bgr_to_rgb=True),
    weights="ViT-B/16",  # or ViT-L/14, ViT-B-16:dfn2b, ... (docs/weights.md), or your own file
    templates="auto",  # those of the weights' authors; for CLIP its 80 zero-shot prompts
    logit_scale=40.0,  # factor on the cosines before the softmax over all queries
    prob_thd=0.0,  # pixels whose best probability is below this become class 0 (background)
    area_thd=None,  # classes that cover at most this share of the foreground are removed
    slide_crop=224,  # side of the sliding windows; 0 takes the whole image at once
    slide_stride=112,
    pamr_steps=0,  # steps of pixel-adaptive refinement; published SFP numbers use none
    precision="auto",  # fp16 on CUDA, fp32 elsewhere; or half, fp32, fp16, bf16, int8
    window_batch=None,  # windows per forward pass; set a number if memory runs out
    scores=False,  # the metric needs only labels; True adds the score map of each class to results
    # The ablation flags. Each changes the result. To use another preset, which has other flags, replace
    # the whole node (sfp eval --method sclip).
    method=dict(
        type="sfp",  # the released code; sfp_paper is the method on the poster
        # How outlier tokens are replaced. True: neighbour_mean, as in the release; False: not at all.
        # Or the name of another mitigator: median, nearest, inpaint, zero, mask_attention, box_blend.
        purify=True,
        # How outliers are found: som, cls_self_ratio, cls_attention, attention_received,
        # overshadowed, l2_norm, channel_share, weight_norm_channel, lof, lof_textbook, dbscan, hdbscan,
        # optics or isolation_forest. To set knobs (sfp methods --ops) write a node:
        # dict(type="som", gain=1.0).
        pm="som",
        layers=[-2],  # blocks after which outliers are replaced, or "all", sfp_paper's default
        enhancer="qq+kk",  # self-attention of the last block: qk, qq, kk, vv, or sums such as qq+vv
        integrator=True,  # add the second readout, of the sum of earlier layers
        integrator_start=3,  # first layer of that sum, counted from 0
        res_cls=0.3,  # share of the class token added to each patch
        res_scale=5.0,  # outlier: res_cls * res_scale * attention from CLS > attention to itself
    ),
)

test_cfg = dict(type="TestLoop")
test_evaluator = dict(type="SegmentationMetric")
# Benchmarks with another image size or other labels have their own pipeline.
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 336), keep_ratio=True),
    dict(type="LoadAnnotations"),  # after Resize: labels keep their size
    dict(type="PackSegInputs"),
]
test_dataloader = dict(
    batch_size=1,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(pipeline=test_pipeline),
)
