"""Families of names that weights are published under, and what else lies in such files beside a detector."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from detrkit import models
from detrkit.convert.keys import Table
from detrkit.models import Variant
from detrkit.segmentation.head import OFFICIAL as _MASK_HEAD


class Layout(NamedTuple):
    """A family of names that weights are published under.

    Attributes:
        name: for people.
        anchor: a name that every detector has there, and that nothing else has: from it the prefix is read that
            wrappers put before all names, such as `module.` or `detr.`.
        spellings: patterns of other spellings of a name, and what stands in the tables instead.
    """

    name: str
    anchor: str
    spellings: tuple[tuple[str, str], ...] = ()


OFFICIAL = Layout("official", "class_embed.weight")

# Since version 5 transformers calls its modules otherwise, but goes on writing the old names into files. Those of its
# mask heads are the official ones.
HUGGINGFACE = Layout(
    "Hugging Face",
    "class_labels_classifier.weight",
    (
        (r"(.*)\.backbone\.position_embedding\.(.+)", r"\1.position_embedding.\2"),
        (r"(.*)\.backbone\.model\.(.+)", r"\1.backbone.conv_encoder.model.\2"),
        (r"(.*)_attn\.o_proj\.(.+)", r"\1_attn.out_proj.\2"),
        (r"(.*)\.mlp\.(fc[12]\..+)", r"\1.\2"),
        (r"bbox_attention\.([qk])_proj\.(.+)", r"bbox_attention.\1_linear.\2"),
        (r"mask_head\.conv([12])\.conv\.(.+)", r"mask_head.lay\1.\2"),
        (r"mask_head\.conv([12])\.norm\.(.+)", r"mask_head.gn\1.\2"),
        (r"mask_head\.output_conv\.(.+)", r"mask_head.out_lay.\1"),
        *(
            (rf"mask_head\.fpn_stages\.{stage}\.{theirs}\.(.+)", rf"mask_head.{old}{stage + first}.\1")
            for stage in range(3)
            for theirs, old, first in (
                ("fpn_adapter", "adapter", 1),
                (r"refine\.conv", "lay", 3),
                (r"refine\.norm", "gn", 3),
            )
        ),
    ),
)

MASK_HEAD = "mask_head."
"""What our names of a mask head's tensors begin with where they stand beside those of the detector."""

MASK_TABLE: Table = tuple((theirs, f"{MASK_HEAD}{ours}") for theirs, ours in _MASK_HEAD if isinstance(ours, str))
"""The names of a mask head's tensors, the same in all families, to ours."""

PRETEXT = "UP-DETR's pretext task's, not the detector's"

BESIDE = (
    (r"(patch2query|feature_align)\..+", PRETEXT),
    (r".+\.num_batches_tracked", "a counter, which frozen batch norms do not have"),
)
"""What published files hold that is no part of a model of ours, and why."""


def spelled(key: str, layout: Layout) -> str:
    """A name, without what a wrapper put before it, in the spelling of the tables."""
    for pattern, spelling in layout.spellings:
        if found := re.fullmatch(pattern, key):
            key = found.expand(spelling)
    return key


def prefixes(keys: Iterable[str], layout: Layout) -> list[str]:
    """What stands before the names of each detector that is there under the layout's names."""
    anchor = layout.anchor
    return sorted({key.removesuffix(anchor) for key in keys if key == anchor or key.endswith("." + anchor)})


def mask_prefix(keys: Iterable[str]) -> str | None:
    """What stands before the names of the mask head, which wraps the detector; None where there is none."""
    found = (re.fullmatch(r"((?:.*\.)?)(?:mask_head|bbox_attention)\..+", key) for key in keys)
    return min((match[1] for match in found if match), key=len, default=None)


def table_of(module: Variant, layout: Layout) -> Table:
    """A variant's key table for a family of names; empty if it has none."""
    if layout is OFFICIAL:
        return module.OFFICIAL
    known = getattr(module, "HUGGINGFACE", None)
    return () if known is None else known.table


def model_type(variant: str) -> str:
    """What a Hugging Face config calls a variant; empty where it has no place there."""
    known = getattr(models.variant(variant), "HUGGINGFACE", None)
    return "" if known is None else known.model_type
