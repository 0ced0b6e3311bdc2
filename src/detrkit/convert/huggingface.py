"""Model folders of the `transformers` library, read without it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from detrkit import models
from detrkit.convert.recognition import Source
from detrkit.data.coco_names import STUFF
from detrkit.documents import read_json
from detrkit.errors import ModelError
from detrkit.models._keys import HuggingFace
from detrkit.nn.weights import read_weight_file
from detrkit.structures import NORMALIZATION_MEAN, NORMALIZATION_STD, Category

HUGGINGFACE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")

# What a config of theirs may say that ours cannot, the value that ours has, and what another value means.
_FIXED = (
    ("activation_function", "relu", "another activation in the feed-forward blocks"),
    ("auxiliary_loss", False, "there, this also puts a norm between the decoder's layers"),
    ("num_channels", 3, "images with other channels"),
)
_FIXED_BACKBONE = (
    ("hidden_act", "relu", "another activation in the backbone"),
    ("downsample_in_first_stage", False, "another ResNet than torchvision's"),
    ("downsample_in_bottleneck", False, "another ResNet than torchvision's"),
)

_RESCALE = 1 / 255

# Of these, matching and loss may have a weight each there; they change no prediction, and the loss's is ours.
_OF_THE_LOSS = {"class_weight", "l1_weight", "giou_weight", "no_object_weight", "focal_alpha"}


def is_huggingface(folder: str | Path) -> bool:
    """Whether a folder is a model folder of `transformers`: its config.json names a type of model."""
    try:
        config = read_json(Path(folder) / "config.json")
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and isinstance(config.get("model_type"), str)


def read_folder(folder: Path) -> Source:
    """The weights of a Hugging Face folder, and what its JSON files say about them.

    Raises:
        ModelError: no such folder, a damaged file, or a config that no model of ours can follow.
    """
    if not is_huggingface(folder):
        raise ModelError(
            "This is no Hugging Face model folder", where=folder, expected="a config.json with a model_type"
        )
    config = _read_json(folder / "config.json")
    _refuse_differences(folder, config)
    known = _known_as(str(config["model_type"]))
    settings = {} if known is None else _settings(folder, config, known)
    settings.update(_sizes(folder))
    architectures = config.get("architectures")
    architectures = architectures if isinstance(architectures, list) and architectures else [""]
    return Source(
        _read_tensors(folder),
        str(folder),
        settings,
        _categories(folder, config.get("id2label")),
        str(config["model_type"]),
        str(architectures[0]),
    )


def _known_as(model_type: str) -> HuggingFace | None:
    """How the variant of this type is held there."""
    found = (getattr(models.variant(name), "HUGGINGFACE", None) for name in models.names())
    return next((known for known in found if known is not None and known.model_type == model_type), None)


def _refuse_differences(folder: Path, config: Mapping[str, Any]) -> None:
    backbone = config.get("backbone_config")
    inner: Mapping[str, Any] = backbone if isinstance(backbone, Mapping) else {}
    parts = [(config, _FIXED), (inner, _FIXED_BACKBONE)]
    found = [
        f"{name} {given[name]!r} ({meaning})"
        for given, fixed in parts
        for name, value, meaning in fixed
        if given.get(name, value) != value
    ]
    if found:
        raise ModelError(
            "The model does something that ours cannot",
            where=folder / "config.json",
            got=", ".join(found),
            remedy="To convert its weights all the same, copy the file of the weights to another place and name that.",
        )


def _settings(folder: Path, config: Mapping[str, Any], known: HuggingFace) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for ours, theirs in known.fields.items():
        if ours in _OF_THE_LOSS:
            theirs = tuple(name for name in theirs if name.endswith("loss_coefficient")) or theirs
        said = {name: config[name] for name in theirs if config.get(name) is not None}
        values = list(said.values())
        if any(value != values[0] for value in values):
            raise ModelError(
                f"What is one number here, {ours}, is several there",
                where=folder / "config.json",
                got=", ".join(f"{name} {value}" for name, value in said.items()),
            )
        if said:
            settings[ours] = _as_whole(values[0])
    backbone = config.get("backbone_config")
    if isinstance(backbone, Mapping) and backbone.get("output_stride") == 16:
        settings["dilated"] = True
    return settings


def _as_whole(value: Any) -> Any:
    """2 for 2.0, as JSON written by other programs has it; everything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _sizes(folder: Path) -> dict[str, int]:
    """The sizes that images are brought to, if the folder says them; refuses other preparations of pixels than ours."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return {}
    said = _read_json(file)
    _refuse_preparations(file, said)
    size: Any = said.get("size")
    named = {"image_size": size, "longest": said.get("max_size")}  # as before version 4.27
    if isinstance(size, Mapping):
        named = {"image_size": size.get("shortest_edge"), "longest": size.get("longest_edge")}
        # A frame that images are fitted into; ours never distorts, where theirs does for `height` and `width`.
        for height, width in (("max_height", "max_width"), ("height", "width")):
            if _is_number(size.get(height)) and _is_number(size.get(width)):
                frame = sorted((size[height], size[width]))
                named = {"image_size": frame[0], "longest": frame[1]}
    return {name: value for name, value in named.items() if isinstance(value, int)}


def _refuse_preparations(file: Path, said: Mapping[str, Any]) -> None:
    for name, meaning in (("do_rescale", "from 0 to 1"), ("do_normalize", "normalised")):
        if said.get(name, True) is not True:
            raise ModelError(
                f"The model wants images that are not {meaning}",
                where=file,
                got=f"{name} {said[name]!r}",
                expected=True,
            )
    factor = said.get("rescale_factor", _RESCALE)
    if not (_is_number(factor) and abs(factor - _RESCALE) < 1e-6):
        raise ModelError(
            "The model wants pixels of another range", where=file, got=f"rescale_factor {factor!r}", expected="1/255"
        )
    for name, ours in (("image_mean", NORMALIZATION_MEAN), ("image_std", NORMALIZATION_STD)):
        theirs = said.get(name, ours)
        if not (isinstance(theirs, list | tuple) and len(theirs) == 3 and all(map(_is_number, theirs))):
            raise ModelError(
                f"The {name} cannot be understood", where=file, got=repr(theirs), expected=f"three numbers: {ours}"
            )
        if not all(abs(a - b) <= 1e-3 for a, b in zip(theirs, ours, strict=True)):
            raise ModelError(
                "The model wants images normalised in another way", where=file, got=f"{name} {theirs}", expected=ours
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _categories(folder: Path, names: object) -> tuple[Category, ...]:
    """The table of `id2label`; none where it only has the names that `transformers` makes up."""
    if not isinstance(names, Mapping):
        return ()
    try:
        table = {int(label): str(name) for label, name in names.items()}
    except ValueError:
        table = {-1: ""}
    if sorted(table) != list(range(len(table))):
        raise ModelError(
            "The labels are not numbered from 0 on", where=folder / "config.json", got=f"id2label {list(names)[:8]}"
        )
    if all(name == f"LABEL_{label}" for label, name in table.items()):
        return ()
    # COCO's ids have gaps, which published models call N/A; names are told apart here. What is stuff is not said there.
    return tuple(
        Category(label, f"unused-{label}" if name == "N/A" else name, STUFF.get(label) != name)
        for label, name in sorted(table.items())
    )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or any("/" in str(shard) for shard in shards.values()):
            raise ModelError("The list of the weights' files cannot be understood", where=index)
        files = [folder / str(shard) for shard in sorted(set(shards.values()))]
        return {key: tensor for file in files for key, tensor in read_weight_file(file).items()}
    for name in HUGGINGFACE_WEIGHTS:
        if (folder / name).is_file():
            return read_weight_file(folder / name)
    raise ModelError("The folder holds no weights", where=folder, expected=" or ".join(HUGGINGFACE_WEIGHTS))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise ModelError("The file cannot be read", where=file, got=error) from error
    if not isinstance(content, dict):
        raise ModelError("The file does not hold a JSON object", where=file)
    return content
