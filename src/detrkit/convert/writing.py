"""Models of ours as folders of the `transformers` library, written without it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import Tensor, nn

from detrkit import models
from detrkit.convert.keys import rename_back
from detrkit.convert.layouts import MASK_HEAD, MASK_TABLE
from detrkit.errors import Error, ModelError, UsageError
from detrkit.models._keys import TIMM, HuggingFace
from detrkit.nn.resnet import ARCHITECTURES
from detrkit.segmentation.head import MaskHead
from detrkit.segmentation.model import Segmenter
from detrkit.structures import NORMALIZATION_MEAN, NORMALIZATION_STD, Category

_WHOLE = (
    *("class_cost", "bbox_cost", "giou_cost"),
    *("cls_loss_coefficient", "bbox_loss_coefficient", "giou_loss_coefficient"),
)

_PLACES = (
    "Only post-norm DETR and Conditional DETR with a ResNet, one group of queries and the paper's start of queries "
    "have a place there."
)
_MASK_PLACES = "Mask heads there normalise attention over all heads at once, and read the three maps that are finer."

_FINER, _GROUPS = 3, 8  # maps that a mask head reads there, and groups of its norms where there are as many channels

# Fields that have no name in their config and need none: shapes say the first, and the others change no prediction.
_WITHOUT_NAME = {"num_classes", "backbone", "stride", "frozen_stages", "focal_gamma", "image_size", "longest"}


def to_huggingface(
    model: nn.Module, folder: str | Path, *, categories: tuple[Category, ...] = (), timm: bool = False
) -> None:
    """Write a model as a folder that `transformers` loads: config.json, model.safetensors, preprocessor_config.json.

    What the folder cannot hold is lost, and changes no prediction: the ids of the categories (labels are numbered from
    0 on there) and which of them are stuff, which label each of several categories of one name has by that name
    (`label2id`; `id2label` has them all), `frozen_stages`, `focal_gamma`, and weights of the loss that are no whole
    numbers.

    Args:
        model: of a variant that `transformers` has, with a ResNet, or a `Segmenter` that holds one.
        folder: a new or empty folder.
        categories: the category table; numbers stand in for it where it is empty.
        timm: name the backbone's tensors as the timm library does, which `transformers` then needs. Only so can a DC5
            model be written.

    Raises:
        Error: the disk is full or cannot be written.
        ModelError: the model has no place there; names the fields of its config that stand in the way.
        UsageError: the folder holds something, or the categories are not as many as the model's classes.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError("The output folder is not empty", where=folder, remedy="Name a new folder.")
    detector, mask_head = (model.detector, model.mask_head) if isinstance(model, Segmenter) else (model, None)
    known = _place(detector, mask_head, timm)
    config = _config(detector.config, known, categories, timm, has_masks=mask_head is not None)
    preprocessor = _preprocessor(detector.config, known, all(category.is_thing for category in categories))
    tensors = _tensors(detector, mask_head, known, timm)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            save_file(tensors, fresh / "model.safetensors", metadata={"format": "pt"})
            _write_json(fresh / "config.json", config)
            _write_json(fresh / "preprocessor_config.json", preprocessor)
            for path in fresh.iterdir():
                path.chmod(0o644)
            fresh.chmod(0o755)
            fresh.replace(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        raise Error(
            "The folder cannot be written", where=folder, got=error, remedy="Write to another place."
        ) from error


def _place(model: nn.Module, mask_head: MaskHead | None, timm: bool) -> HuggingFace:
    """How `transformers` holds the model's variant.

    Raises:
        ModelError: it cannot hold this model.
    """
    name = type(model).__module__.rsplit(".", 1)[-1]
    module = models.variant(name)
    known = getattr(module, "HUGGINGFACE", None)
    if known is None:
        raise ModelError("This variant has no place in transformers", got=name, remedy=_PLACES)
    config: Any = model.config
    default = module.Config()
    named = {*known.fields, *_WITHOUT_NAME}
    ways = [
        f"{field.name}={getattr(config, field.name)!r} (there {getattr(default, field.name)!r})"
        for field in fields(config)
        if field.name not in named and getattr(config, field.name) != getattr(default, field.name)
    ]
    architecture = ARCHITECTURES.get(config.backbone)
    if architecture is None or architecture.groups:
        ways.append(f"backbone={config.backbone!r} (there a ResNet with batch norms)")
    if config.dilated and not timm:
        ways.append("dilated=True (there only with a backbone of timm: timm=True)")
    if timm and config.stride != 32:
        ways.append(f"stride={config.stride} (32 with a backbone of timm)")
    ways += [] if mask_head is None else _ways_of_masks(mask_head)
    if ways:
        remedy = _PLACES if mask_head is None else f"{_PLACES} {_MASK_PLACES}"
        raise ModelError("The model has no place in transformers", got=", ".join(ways), remedy=remedy)
    return cast(HuggingFace, known)


def _ways_of_masks(mask_head: MaskHead) -> list[str]:
    """What of a mask head stands in the way."""
    ways = []
    if mask_head.attention != "joint":
        ways.append(f"mask_attention={mask_head.attention!r} (there 'joint')")
    if mask_head.box:
        ways.append("mask_box=True (there False)")
    if len(mask_head.adapters) != _FINER:
        ways.append(f"a mask head on {len(mask_head.adapters)} finer maps (there {_FINER})")
    norms = [norm for norm in mask_head.norms if isinstance(norm, nn.GroupNorm)]
    channels = [norm.num_channels for norm in norms if norm.num_groups != min(_GROUPS, norm.num_channels)]
    if channels:
        ways.append(f"{channels[0]} channels in the mask head (there a multiple of {_GROUPS}, or fewer)")
    return ways


def _tensors(model: nn.Module, mask_head: MaskHead | None, known: HuggingFace, timm: bool) -> dict[str, Tensor]:
    """All tensors under their names; where there is a mask head, it holds the detector."""
    table = (*TIMM, *known.table) if timm else known.table
    tensors = rename_back(model.state_dict(), table)
    if mask_head is not None:
        held = {f"{known.model_type}.{name}": tensor for name, tensor in tensors.items()}
        tensors = {**held, **rename_back(mask_head.state_dict(prefix=MASK_HEAD), MASK_TABLE)}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _config(
    config: Any, known: HuggingFace, categories: tuple[Category, ...], timm: bool, *, has_masks: bool
) -> dict[str, Any]:
    names = [category.name for category in categories] or [f"LABEL_{label}" for label in range(config.num_classes)]
    if len(names) != config.num_classes:
        raise UsageError(
            "The categories do not fit the model", got=f"{len(names)} names", expected=f"{config.num_classes}"
        )
    values = {name: getattr(config, ours) for ours, theirs in known.fields.items() for name in theirs}
    # These are whole numbers there, and a folder with others would not load.
    weights = {name: values.pop(name) for name in list(values) if name in _WHOLE}
    return {
        "architectures": [f"{known.family}{'ForSegmentation' if has_masks else 'ForObjectDetection'}"],
        "model_type": known.model_type,
        **values,
        **{name: int(value) for name, value in weights.items() if value == int(value)},
        **_backbone(config, timm, has_masks),
        "auxiliary_loss": False,
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
    }


def _backbone(config: Any, timm: bool, has_masks: bool) -> dict[str, Any]:
    if timm:
        named = {"backbone": config.backbone, "use_pretrained_backbone": False}
        return {"use_timm_backbone": True, **named, "backbone_config": None}
    network = ARCHITECTURES[config.backbone]
    stages = {4: 1, 8: 2, 16: 3, 32: 4}[config.stride]
    widths = [width * (4 if network.bottleneck else 1) for width in network.widths[:stages]]
    return {
        "use_timm_backbone": False,
        "backbone_config": {
            "model_type": "resnet",
            "layer_type": "bottleneck" if network.bottleneck else "basic",
            "embedding_size": network.stem,
            "hidden_sizes": widths,
            "depths": list(network.blocks[:stages]),
            "out_features": [f"stage{number}" for number in range(1 if has_masks else stages, stages + 1)],
        },
    }


def _preprocessor(config: Any, known: HuggingFace, are_things: bool) -> dict[str, Any]:
    return {
        "image_processor_type": f"{known.family}ImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": config.image_size, "longest_edge": config.longest},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(NORMALIZATION_MEAN),
        "image_std": list(NORMALIZATION_STD),
        "do_pad": True,
        "format": "coco_detection" if are_things else "coco_panoptic",
    }


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
