"""What a backbone starts from: a local weight file, or a random initialisation that was asked for by name.

`read_weight_file` is the only place where files written by others are opened; it never runs code that they hold.
"""

from __future__ import annotations

import argparse
import os
import pickle
import string
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from safetensors.torch import load_file
from torch import Tensor

from detrkit.errors import ModelError
from detrkit.nn.backbone import TRANSFORMERS_PREFIX, AutoBackbone, Backbone

RANDOM = "random"
"""The `weights` that ask for a random initialisation."""

BACKBONE_FILE = "backbone.safetensors"
"""The file of a run folder, or of its `model/`, that holds the weights of a backbone that was trained alone."""

FOLDER_VARIABLE = "DETRKIT_WEIGHTS"
"""The environment variable that names a folder of weight files."""

PUBLISHED = {
    "mobilenet_v2": ("mobilenet_v2_imagenet_folded_fp16.npz",),
    "mobilenet_v2_torchvision": ("mobilenet_v2-b0353104.pth", "mobilenet_v2-7ebf99e0.pth"),
    "resnet18": ("resnet18-f37072fd.pth",),
    "resnet34": ("resnet34-b627a593.pth",),
    "resnet50": ("resnet50-0676ba61.pth", "resnet50-19c8e357.pth"),
    "resnet101": ("resnet101-63fe2227.pth", "resnet101-5d3b4d8f.pth"),
}
"""The well-known files of ImageNet weights, by backbone; DETR starts from the first of each."""

_TORCHVISION_URL = "https://download.pytorch.org/models/"
_SUFFIXES = (".safetensors", ".npz", ".pth")
_PICKLES = (".pth", ".pt", ".bin", ".tar", ".ckpt")
ENDINGS = (".safetensors", ".npz", *_PICKLES)
"""What the names of weight files end in."""

WRAPPERS = ("model", "state_dict", "model_state_dict")
"""Training checkpoints keep the network's weights under one of these."""

# What stands on a backbone in published files, and has no place in a detector.
_HEADS = ("fc.", "classifier.", "head.", "projection_head.", "prototypes.")

MOST_UNPACKED = 20
"""How many times its size an archive of weights may unpack to."""

ALWAYS_UNPACKED = 1 << 26
"""Bytes that any file may unpack to, such as one of zeros."""

MOST_DIMENSIONS = 16
"""Of a tensor of weights."""

_SHOWN = 6


@dataclass(frozen=True)
class LoadReport:
    """What became of a weight file.

    Attributes:
        source: the file, `random`, or the hub name.
        loaded: number of tensors that were taken.
        ignored: names of the file's tensors that the backbone has no use for: classifiers, layers that were not built.
    """

    source: str
    loaded: int
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.loaded} tensors from {self.source}"
        others = f"{len(self.ignored)} of the file are of layers that the backbone does not have"
        return f"{text}; {others}, such as {self.ignored[0]}" if self.ignored else text


@dataclass(frozen=True)
class Checkpoint:
    """What a weight file holds.

    Attributes:
        tensors: by name, on the CPU.
        arguments: the settings of the training that wrote it, where they are plain values; often there are none.
    """

    tensors: dict[str, Tensor]
    arguments: dict[str, Any] = field(default_factory=dict)


def load_backbone_weights(
    backbone: Backbone, name: str, weights: str | Path = "", *, generator: torch.Generator | None = None
) -> LoadReport:
    """Set all weights of a backbone.

    Args:
        backbone: from `build_backbone(name)`.
        name: its name.
        weights: a .safetensors, .npz or .pth file; the run folder of a backbone's pre-training; `random` for an
            initialisation that trains from nothing (the whole backbone is then trained); or empty to look for a file
            of the backbone's name, or its well-known name, in the folder $DETRKIT_WEIGHTS, in ~/.cache/detrkit/weights
            and among torch's own downloads.
        generator: the source of random numbers; torch's default one where None.

    Returns:
        What was loaded, and what of the file was not needed.

    Raises:
        ModelError: no file, an unreadable one, or one that does not fit: the message names the tensors.
    """
    if str(weights) == RANDOM:
        backbone.initialise(generator)
        backbone.freeze(0)
        return LoadReport(RANDOM, len(backbone.state_dict()))
    if not str(weights) and isinstance(backbone, AutoBackbone):
        found, source = backbone.pretrained(), TRANSFORMERS_PREFIX + backbone.source
    else:
        path = _of_run(Path(weights)) if str(weights) else find_weight_file(name)
        if not path.is_file():
            raise ModelError("There is no such weight file", where=path, remedy=_how_to_get(name))
        found, source = read_weight_file(path), str(path)
    return _load(backbone, found, source)


def find_weight_file(name: str) -> Path:
    """The weight file of a backbone, from the folders where such files are kept.

    Args:
        name: of the backbone.

    Raises:
        ModelError: no folder has one; says where it looked and how to get one.
    """
    files = [name + suffix for suffix in _SUFFIXES] + list(PUBLISHED.get(name, ()))
    folders = weight_folders()
    for folder in folders:
        for file in files:
            if (folder / file).is_file():
                return folder / file
    raise ModelError(
        f"No weights for the backbone {name!r} on this machine",
        got=f"none of {', '.join(files)} in {', '.join(str(folder) for folder in folders)}",
        remedy=_how_to_get(name),
    )


def _of_run(path: Path) -> Path:
    """The backbone of a run folder that holds one, or the path itself."""
    files = (path / place / BACKBONE_FILE for place in ("", "model", "checkpoints/best", "checkpoints/last"))
    return next((file for file in files if file.is_file()), path)


def weight_folders() -> list[Path]:
    """Where weight files are looked for, in this order: $DETRKIT_WEIGHTS, our cache, torch's downloads."""
    named = os.environ.get(FOLDER_VARIABLE, "")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folders = [cache / "detrkit" / "weights", Path(torch.hub.get_dir()) / "checkpoints"]
    return [Path(named), *folders] if named else folders


def _how_to_get(name: str) -> str:
    published = PUBLISHED.get(name, ())
    random = f"or ask for {RANDOM!r} instead of a file, to train the backbone from nothing."
    if name == "mobilenet_v2":  # TensorFlow's conventions, whose converted weights have no well-known address
        other = f"{_TORCHVISION_URL}{PUBLISHED['mobilenet_v2_torchvision'][0]}"
        return (
            f"Give the path of {published[0]}; or get {other} and give its path, with the backbone "
            f"mobilenet_v2_torchvision (--architecture backbone mobilenet_v2_torchvision); {random}"
        )
    if not published:
        return f"Give the path of a weight file, {random}"
    place = f"{_TORCHVISION_URL}{published[0]}" if published[0].endswith(".pth") else published[0]
    folder = f"a folder that ${FOLDER_VARIABLE} names"
    return f"Get {place} and give its path, or put it into {folder}, {random}"


def read_weight_file(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weight file, on the CPU, by name.

    Training checkpoints are unwrapped: the tensors are those under `model`, `state_dict` or `model_state_dict`.

    Args:
        path: .safetensors, .npz, or a file of `torch.save` (.pth, .pt, .bin, .tar, .ckpt), of which only tensors and
            plain values are read (`weights_only=True`).

    Raises:
        ModelError: no such file, another kind of file, a damaged one, or one that holds code or no tensors.
    """
    return read_checkpoint(path).tensors


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The tensors of a weight file and the settings beside them; arguments and errors as for `read_weight_file`."""
    path = Path(path)
    if not os.path.isfile(path):  # noqa: PTH113 - a `Path` raises for a name that no file can have
        raise ModelError("There is no such weight file", where=path)
    suffix = path.suffix.lower()
    if suffix not in ENDINGS:
        kinds = ", ".join(ENDINGS)
        raise ModelError("This is not a kind of weight file that can be read", where=path, got=suffix, expected=kinds)
    _refuse_pointer(path)
    _refuse_bomb(path)
    try:
        if suffix == ".safetensors":
            found = Checkpoint(dict(load_file(path)))
        elif suffix == ".npz":
            found = Checkpoint(_read_npz(path))
        else:
            found = _read_pickle(path)
        for name, tensor in found.tensors.items():
            if tensor.ndim > MOST_DIMENSIONS:  # of more than 64, nothing can be computed
                raise ValueError(f"{name} has {tensor.ndim} dimensions")
    except Exception as error:  # the parsers fail in any way on bytes that they were not made for
        raise _unreadable(path, error) from error
    if not found.tensors:
        raise ModelError("The file holds no tensors", where=path, expected="a state dict")
    return found


def _refuse_pointer(path: Path) -> None:
    start = _start(path)
    if not start:
        raise ModelError("The weight file is empty", where=path, got="0 bytes", remedy="Get it again.")
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(
            "This is a Git LFS pointer, not the weights", where=path, remedy="Fetch the file itself with: git lfs pull"
        )


def _refuse_bomb(path: Path) -> None:
    """Refuse an archive that unpacks to many times its size: weights are noise, which can hardly be packed."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(one.file_size for one in archive.infolist())
    except Exception:  # no archive, or a damaged one: for the parsers to say
        return
    packed = path.stat().st_size
    if unpacked > max(MOST_UNPACKED * packed, ALWAYS_UNPACKED):
        raise ModelError(
            "The archive unpacks to many times its size",
            where=path,
            got=f"{unpacked:,} bytes out of {packed:,}",
            expected=f"at most {MOST_UNPACKED} times as many",
            remedy="If you trust it, save its tensors anew, best as .safetensors.",
        )


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise ModelError("The weight file cannot be read", where=path, got=error) from error


def _unreadable(path: Path, error: Exception) -> ModelError:
    """What to say of a file that no parser understood.

    Text is looked for only now: the first bytes of some good files are printable, too.
    """
    start = _start(path)
    is_page = start.lstrip().startswith(b"<") and b"\0" not in start
    if is_page or not set(start) - set(string.printable.encode()):
        return ModelError(
            "The file holds text, not weights",
            where=path,
            got=ascii(start[:40].decode("latin-1")),
            remedy="It is perhaps an error page in place of the download: get it again.",
        )
    if isinstance(error, pickle.UnpicklingError):
        return ModelError(
            "The file is damaged, or holds objects that only code could rebuild",
            where=path,
            expected="tensors and plain values",
            remedy="Save its state dict alone, best as .safetensors, where you trust the file.",
        )
    return ModelError(
        "The weight file cannot be read",
        where=path,
        got=str(error).split("\n", 1)[0] or type(error).__name__,
        remedy="It may be cut short or hold something else: get it again.",
    )


def _read_npz(path: Path) -> dict[str, Tensor]:
    # Opened here, because NumPy leaves its own handle open where the archive turns out to be damaged.
    with path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, NpzFile):
            raise ValueError("one array without a name (.npy), not an archive of arrays")
        with archive:
            return {name: _numbers(name, archive[name]) for name in archive.files}


def _numbers(name: str, found: Any) -> Tensor:
    array = np.ascontiguousarray(found)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds no real numbers but {array.dtype}")
    return torch.from_numpy(array)


def _read_pickle(path: Path) -> Checkpoint:
    # Research checkpoints carry the command line as a Namespace: plain values, no code.
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        # Torch asks people to report pickles of other protocols to it; where one cannot be read, our error says so.
        warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
        whole: Any = torch.load(path, map_location="cpu", weights_only=True)
    content = whole
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping):
        raise ValueError(f"a {type(content).__name__}, not a state dict")
    arguments = whole.get("args")
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    tensors = {str(name): value.detach() for name, value in content.items() if isinstance(value, Tensor)}
    size = path.stat().st_size
    for name, tensor in tensors.items():
        # One number can be stretched to any shape, and takes its memory with the first computation.
        if tensor.numel() * tensor.element_size() > size + ALWAYS_UNPACKED:
            raise ValueError(f"{name} claims {tensor.numel():,} numbers, more than the whole file holds")
    return Checkpoint(tensors, dict(arguments) if isinstance(arguments, Mapping) else {})


def _load(backbone: Backbone, found: dict[str, Tensor], source: str) -> LoadReport:
    wanted = backbone.state_dict()
    prefix = _prefix(wanted, found, source)
    inner = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    ignored = [key for key in found if not key.startswith(prefix)]
    inner = {key: value for key, value in inner.items() if not key.endswith(".num_batches_tracked")}
    inner = backbone.adapt(inner, source)
    for key in list(inner):
        if key not in wanted and (key.startswith(_HEADS) or backbone.is_unused(key)):
            ignored.append(prefix + key)
            del inner[key]
    _check(wanted, inner, source)
    with torch.no_grad():
        for key, value in wanted.items():
            value.copy_(inner[key])
    return LoadReport(source, len(wanted), tuple(ignored))


def _prefix(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str) -> str:
    """What stands before the backbone's names in the file, such as `module.` or `backbone.0.body.`."""
    # The first convolution, because every form of a file has it: biases and norms come and go with folding.
    anchor = next((key for key, value in wanted.items() if value.ndim == 4), next(iter(wanted)))
    candidates = {key[: -len(anchor)] for key in found if key == anchor or key.endswith("." + anchor)}
    fits = {prefix: sum(prefix + key in found for key in wanted) for prefix in candidates}
    best = sorted(prefix for prefix, count in fits.items() if count == max(fits.values()))
    if len(best) > 1:
        raise ModelError(
            "The file holds the backbone more than once",
            where=source,
            got=f"names under {' and '.join(repr(prefix) for prefix in best)}",
            remedy="Save the one that you mean as a file of its own.",
        )
    return best[0] if best else ""


def _check(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str) -> None:
    missing = [key for key in wanted if key not in found]
    unexpected = [key for key in found if key not in wanted]
    shapes = [
        f"{key} {tuple(found[key].shape)} for {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in found and found[key].shape != value.shape
    ]
    broken = [key for key, value in found.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    problems = (("missing", missing), ("unexpected", unexpected), ("other shapes", shapes), ("not finite", broken))
    differences = "; ".join(f"{what}: {_listed(keys)}" for what, keys in problems if keys)
    if differences:
        raise ModelError(
            "The weights do not fit the backbone",
            where=source,
            got=differences,
            remedy="Check that the file is of the backbone that was asked for.",
        )


def _listed(keys: list[str] | tuple[str, ...]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more
