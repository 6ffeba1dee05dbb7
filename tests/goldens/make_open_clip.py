"""Writes open_clip.safetensors, the results of open_clip's own model code with small random weights.

    pip download --no-deps open_clip_torch==3.3.0 && unzip -q open_clip_torch-3.3.0-*.whl -d unpacked
    python tests/goldens/make_open_clip.py unpacked

Of the package only the modules of the model are imported, as they are. Its `__init__` would import
torchvision for image transforms; here torchvision is a stand-in with the one class that
`open_clip.utils` asks for (a frozen batch norm, for ResNets) and that is never made.
"""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch
from safetensors.torch import save_file

VISION = dict(layers=2, width=48, head_width=24, mlp_ratio=2.5, patch_size=4, image_size=16)
TEXT = dict(context_length=12, vocab_size=64, width=32, heads=2, layers=2)
EMBED = 24


def model_module(folder: Path) -> types.ModuleType:
    """open_clip.model, without the rest of the package."""
    package = types.ModuleType("open_clip")
    package.__path__ = [str(folder / "open_clip")]
    sys.modules["open_clip"] = package
    for name in ("torchvision", "torchvision.ops", "torchvision.ops.misc"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (), {})
    import open_clip.model

    return open_clip.model


def main(folder: Path) -> None:
    module = model_module(folder)
    torch.manual_seed(0)
    model = module.CLIP(EMBED, module.CLIPVisionCfg(**VISION), module.CLIPTextCfg(**TEXT))
    for name, parameter in model.named_parameters():
        if name != "logit_scale":  # uneven, and of 16 bits without loss
            noisy = parameter.data + torch.randn_like(parameter) * 0.15
            parameter.data = noisy.bfloat16().float()
        parameter.data = parameter.data.bfloat16().float()
    image = torch.randn(2, 3, 16, 16)
    ids = torch.randint(1, 62, (3, TEXT["context_length"]))
    for row, end in enumerate((4, 11, 7)):
        ids[row, 0], ids[row, end], ids[row, end + 1 :] = 62, 63, 0
    golden = {f"weights/{k}": v.bfloat16().contiguous() for k, v in model.state_dict().items()}
    golden |= {"image": image, "ids": ids}
    for quick in (False, True):
        args = EMBED, module.CLIPVisionCfg(**VISION), module.CLIPTextCfg(**TEXT), quick
        twins = module.CLIP(*args), module.CustomTextCLIP(*args)
        twins[0].load_state_dict(model.state_dict())
        twins[1].load_state_dict(module.convert_to_custom_text_state_dict(model.state_dict()))
        outputs = []
        for twin in twins:
            twin.eval()
            with torch.no_grad():
                image_features, text_features, scale = twin(image, ids)
                seen = twin.visual.forward_intermediates(
                    image, output_fmt="NLC", output_extra_tokens=True
                )
            layers = [
                torch.cat([cls, patches], 1)
                for cls, patches in zip(
                    seen["image_intermediates_prefix"], seen["image_intermediates"], strict=True
                )
            ]
            outputs.append(
                dict(
                    image_features=image_features,
                    text_features=text_features,
                    logits=scale * image_features @ text_features.T,
                    layers=torch.stack(layers),
                )
            )
        for key, value in outputs[0].items():
            assert torch.equal(value, outputs[1][key]), key
            golden[f"{'quick_gelu' if quick else 'gelu'}/{key}"] = value.contiguous()
    names = " ".join(twins[1].state_dict())  # of the layout with text.*
    path = Path(__file__).with_name("open_clip.safetensors")
    save_file(golden, path, metadata={"custom_text": names})
    print(f"{path}: {path.stat().st_size} bytes, {len(golden)} tensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
