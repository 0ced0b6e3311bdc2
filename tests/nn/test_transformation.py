"""The forms of T in Conditional DETR's spatial queries."""

from __future__ import annotations

import pytest
import torch

from detrkit.nn.transformation import TRANSFORMATIONS, Transformation


@pytest.mark.parametrize("form", TRANSFORMATIONS)
def test_each_form_of_the_transformation_is_a_matrix_of_its_kind(form: str) -> None:
    """T is linear in the encoding; what it does to the unit vectors shows which entries it may have."""
    transformation = Transformation(form, 12, 3)
    x = torch.randn(2, 5, 12)
    units = torch.eye(12).expand(2, 5, 12, 12)
    with torch.no_grad():
        columns = [transformation(x, units[..., column, :]) for column in range(12)]
        matrix = torch.stack(columns, -1)
        encoded = torch.randn(2, 5, 12)
        torch.testing.assert_close(
            transformation(x, encoded), (matrix @ encoded[..., None])[..., 0], atol=1e-5, rtol=1e-5
        )
    allowed = {
        "identity": torch.eye(12),
        "single": torch.eye(12),
        "diagonal": torch.eye(12),
        "block": torch.block_diag(*torch.ones(3, 4, 4)),
        "full": torch.ones(12, 12),
    }[form]
    assert bool((matrix[..., allowed == 0] == 0).all())
    assert bool((matrix[..., allowed == 1] != 0).all())
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    if form in ("identity", "single"):
        assert bool((diagonal == diagonal[..., :1]).all())
    if form == "identity":
        assert bool((diagonal == 1).all())
    else:  # what was seen decides
        assert not torch.allclose(matrix[0, 0], matrix[0, 1])


@pytest.mark.parametrize("form", ["single", "diagonal"])
def test_factors_can_start_at_one(form: str) -> None:
    transformation = Transformation(form, 12, 3)
    transformation.start_as_identity()
    encoded = torch.randn(2, 5, 12)
    torch.testing.assert_close(transformation(torch.randn(2, 5, 12), encoded), encoded)
