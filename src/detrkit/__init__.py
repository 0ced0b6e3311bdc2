"""The DETR family of object detectors as one practical library.

Public names are loaded when they are first used, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detrkit import convert, find, models, visualize
    from detrkit.data.doctor import Diagnosis
    from detrkit.errors import DataError, Error, MissingExtraError, ModelError, UsageError
    from detrkit.evaluation.run import Metrics
    from detrkit.predict import Detector, load
    from detrkit.structures import Batch, Category, Detections, Predictions, Queries, Target
    from detrkit.training.checkup import doctor
    from detrkit.training.pretraining import PretrainedRun, pretrain
    from detrkit.training.run import Run, evaluate, train

__version__ = "0.1.0"

_HOMES = {
    "Batch": "structures",
    "Category": "structures",
    "DataError": "errors",
    "Detections": "structures",
    "Detector": "predict",
    "Diagnosis": "data.doctor",
    "Error": "errors",
    "Metrics": "evaluation.run",
    "MissingExtraError": "errors",
    "ModelError": "errors",
    "Predictions": "structures",
    "PretrainedRun": "training.pretraining",
    "Queries": "structures",
    "Run": "training.run",
    "Target": "structures",
    "UsageError": "errors",
    "convert": "",
    "doctor": "training.checkup",
    "evaluate": "training.run",
    "find": "",
    "load": "predict",
    "models": "",
    "pretrain": "",
    "train": "training.run",
    "visualize": "",
}

__all__ = [
    "Batch",
    "Category",
    "DataError",
    "Detections",
    "Detector",
    "Diagnosis",
    "Error",
    "Metrics",
    "MissingExtraError",
    "ModelError",
    "Predictions",
    "PretrainedRun",
    "Queries",
    "Run",
    "Target",
    "UsageError",
    "convert",
    "doctor",
    "evaluate",
    "find",
    "load",
    "models",
    "pretrain",
    "train",
    "visualize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'detrkit' has no attribute {name!r}")
    home = _HOMES[name]
    if not home:
        return importlib.import_module(f"detrkit.{name}")
    return getattr(importlib.import_module(f"detrkit.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
