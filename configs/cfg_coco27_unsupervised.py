# COCO-27 without words: k-means over the patch features of its images, 27 clusters, matched to the
# classes by the Hungarian method (docs/applications.md).
# Published: nothing with these settings, since papers on unsupervised segmentation crop images.
# CLIPtrase reports 30.8 mIoU (table 8) without its settings.
#     CONFIG=configs/cfg_coco27_unsupervised.py WORK_DIR=work/coco27_unsupervised sh test.sh

_base_ = "./cfg_coco27.py"

clusters = dict(count=27)  # knobs of sfp.evaluation.clusters.fit_clusters
model = dict(method=dict(_delete_=True, type="cliptrase"))
test_evaluator = dict(type="HungarianMetric")
