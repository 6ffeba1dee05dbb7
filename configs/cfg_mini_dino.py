# The mini world with masks from DINO's patches instead of SAM; needs the extra sfp[guides] and DINO's
# weights (docs/applications.md).
#     CONFIG=configs/cfg_mini_dino.py WORK_DIR=work/mini_dino sh test.sh

_base_ = "./cfg_mini_sam.py"

model = dict(
    masks=dict(
        propose=dict(_delete_=True, type="dino", model="facebook/dino-vitb8", by="similarity"),
    ),
)
