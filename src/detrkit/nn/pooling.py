"""What a map of features says of a place in it."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from detrkit.boxes import cxcywh_to_xyxy


def extents(
    images: Float[Tensor, "b _ h w"], padding: Bool[Tensor, "b h w"] | None, grid: tuple[int, int], stride: int
) -> Float[Tensor, "b 2"]:
    """Height and width of each image, as shares of what the cells of its map stand for.

    Where the stride does not divide a side, the last cell stands for pixels that the image does not have.

    Args:
        images: zeros where padded.
        padding: True where padded; None: nowhere.
        grid: rows and columns of the map.
        stride: of the map, in pixels.
    """
    shares = []
    for axis, cells in enumerate(grid):
        if padding is None:
            pixels = images.new_full((len(images),), images.shape[axis - 2])
        else:
            pixels = (~padding).any(2 - axis).sum(1)
        shares.append(pixels / (cells * stride))  # plain numbers: a tensor of them would wait for its device
    return torch.stack(shares, -1)


def pool_boxes(features: Float[Tensor, "f h w"], boxes: Float[Tensor, "p 4"]) -> Float[Tensor, "p f"]:
    """The mean of a map over boxes; a cell counts by the share of it that lies in the box.

    Args:
        features: one image's map, without padding.
        boxes: cxcywh in [0, 1] of the image, of positive width and height.
    """
    x0, y0, x1, y1 = cxcywh_to_xyxy(boxes).unbind(-1)
    rows, columns = _shares(y0, y1, features.shape[1]), _shares(x0, x1, features.shape[2])
    return torch.einsum("fhw,ph,pw->pf", features, rows, columns)


def pool_grids(
    features: Float[Tensor, "b f h w"], boxes: Float[Tensor, "b p 4"], cells: int
) -> Float[Tensor, "b p {cells}*{cells} f"]:
    """The means of maps over the parts of boxes, each cut into `cells` × `cells` equal ones, row by row.

    Args:
        features: a map for each image.
        boxes: cxcywh in [0, 1] of the map. What lies outside is cut; a box without area is taken for its place.
        cells: parts of a side.
    """
    corners = cxcywh_to_xyxy(boxes).clamp(0, 1)
    low = corners[..., :2]
    high = torch.maximum(corners[..., 2:], low + 1e-4)
    steps = torch.linspace(0, 1, cells + 1, device=boxes.device, dtype=boxes.dtype)
    x, y = (low[..., None] + (high - low)[..., None] * steps).unbind(-2)
    rows = _shares(y[..., :-1], y[..., 1:], features.shape[2]).to(features.dtype)
    columns = _shares(x[..., :-1], x[..., 1:], features.shape[3]).to(features.dtype)
    narrowed = torch.einsum("bfhw,bpiw->bpihf", features, columns)
    return torch.einsum("bpihf,bpjh->bpjif", narrowed, rows).flatten(2, 3)


def pool_lattice(
    features: Float[Tensor, "f h w"],
    x: Float[Tensor, " x"],
    y: Float[Tensor, " y"],
    size: tuple[float, float],
    cells: int,
) -> Float[Tensor, "y x {cells}*{cells} f"]:
    """The same as `pool_grids` for boxes of one size at all crossings of `x` and `y`, at a fraction of the cost.

    Args:
        features: one image's map.
        x: left borders, in [0, 1] of the map.
        y: top borders, in [0, 1] of the map.
        size: width and height of the boxes, in [0, 1] of the map.
        cells: parts of a side.
    """
    steps = torch.linspace(0, 1, cells + 1, device=x.device, dtype=x.dtype)
    across, down = x[:, None] + size[0] * steps, y[:, None] + size[1] * steps
    columns = _shares(across[:, :-1], across[:, 1:], features.shape[2])
    rows = _shares(down[:, :-1], down[:, 1:], features.shape[1])
    narrowed = torch.einsum("fhw,xiw->xihf", features, columns)
    return torch.einsum("xihf,yjh->yxjif", narrowed, rows).flatten(2, 3)


def _shares(low: Float[Tensor, "*p"], high: Float[Tensor, "*p"], cells: int) -> Float[Tensor, "*p {cells}"]:
    """How much of each interval lies in each of the equal cells of [0, 1]; the shares of an interval add up to 1."""
    edge = torch.arange(cells, device=low.device)
    inside = torch.minimum(high[..., None] * cells, edge + 1) - torch.maximum(low[..., None] * cells, edge)
    inside = inside.clamp(min=0)
    return inside / inside.sum(-1, keepdim=True).clamp(min=1e-6)
