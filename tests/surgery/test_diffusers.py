"""A model of somebody else: the U-Net of diffusers, with its insertion points and attention at all of them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from existing_models import wake
from torch_sagan import insert_self_attention, insertion_points, record_attention, remove_self_attention


@pytest.mark.slow  # importing the package takes seconds
@pytest.mark.filterwarnings("ignore")  # what another package warns of is its own affair
def test_the_unet_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    ).eval()
    example = {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor(7)}

    def operations() -> int:
        with FlopCounterMode(display=False) as counter:
            model(**example)
        total: int = counter.get_total_flops()
        return total

    points = insertion_points(model, example)
    found = {point.path: (point.channels, point.size) for point in points}
    assert found["conv_in"] == (8, (16, 16))
    assert found["down_blocks.0.resnets.0"] == (8, (16, 16))
    assert found["mid_block"] == (16, (8, 8))
    assert found["up_blocks.1"] == (8, (16, 16))
    assert not {"down_blocks.0", "down_blocks.1", "time_embedding"} & set(found)  # tuples, a vector
    order = list(found)
    assert order.index("conv_in") < order.index("mid_block") < order.index("up_blocks.0") < order.index("conv_out")
    before, keys, own = model(**example).sample, list(model.state_dict()), operations()
    assert points.operations == own

    insert_self_attention(model, order, example_input=example)
    assert torch.equal(model(**example).sample, before)
    assert operations() - own == sum(point.operations for point in points)
    assert [key for key in model.state_dict() if "inserted_attention" not in key] == keys
    with record_attention(wake(model)) as records:
        assert not torch.allclose(model(**example).sample, before)
    assert {path: len(calls) for path, calls in records.items()} == {f"{at}.inserted_attention": 1 for at in order}
    assert torch.equal(remove_self_attention(model)(**example).sample, before)
    with pytest.raises(ValueError, match=r"'down_blocks.0' returns a tuple of 2"):
        insert_self_attention(model, "down_blocks.0", example_input=example)
