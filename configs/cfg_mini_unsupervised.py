# The mini world without words: k-means over the patch features of its 200 scenes, as many clusters as
# classes, matched to the classes by the Hungarian method (docs/applications.md).
#     CONFIG=configs/cfg_mini_unsupervised.py WORK_DIR=work/mini_unsupervised sh test.sh

_base_ = "./cfg_mini.py"

clusters = dict(count=18)  # knobs of sfp.evaluation.clusters.fit_clusters
model = dict(method=dict(_delete_=True, type="cliptrase"))
test_evaluator = dict(type="HungarianMetric")
