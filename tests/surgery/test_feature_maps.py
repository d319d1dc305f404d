"""Which outputs are feature maps, and of which dimension: (B, C, L) and (B, N, C) look alike, and so do maps without a
batch; and what modules declare."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from existing_models import Wrapped, inserted
from torch_sagan import (
    SelfAttention1d,
    SelfAttention2d,
    SelfAttention3d,
    insert_self_attention,
    insertion_points,
    spectral_norm,
)

LAYERS = {1: SelfAttention1d, 2: SelfAttention2d, 3: SelfAttention3d}


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class ConvolutionModule(nn.Module):
    """As in a Conformer: a convolution along the sequence inside of a block of (B, N, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv = spectral_norm(nn.Conv1d(channels, channels, 3, padding=1))
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.conv(self.norm(x).transpose(1, 2))).transpose(1, 2)


class SpeechModel(nn.Module):
    """As wav2vec 2.0: convolutions (B, C, L), of which one normalizes channels, and then a transformer (B, N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 16, 10, 5)
        self.norm = nn.Sequential(Transposed(), nn.LayerNorm(16), Transposed())
        self.act = nn.GELU()
        self.down = nn.Sequential(nn.Conv1d(16, 16, 3, 2), nn.GroupNorm(4, 16), nn.GELU())
        self.project = nn.Linear(16, 24)
        self.conformer = ConvolutionModule(24)
        self.encoder = nn.TransformerEncoderLayer(24, 2, 48, batch_first=True)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.act(self.norm(self.conv(x))))  # (B, 16, 15)
        return self.head(self.encoder(self.conformer(self.project(x.transpose(1, 2)))))


def test_sequences_of_a_speech_model() -> None:
    """Modules of PyTorch for sequences, and what follows and surrounds them; not what has the channels last."""
    points = insertion_points(SpeechModel(), torch.zeros(2, 1, 160))
    assert [(point.path, point.channels, point.size) for point in points] == [
        ("conv", 16, (31,)),
        ("norm.2", 16, (31,)),
        ("norm", 16, (31,)),
        ("act", 16, (31,)),
        ("down.0", 16, (15,)),
        ("down.1", 16, (15,)),
        ("down.2", 16, (15,)),
        ("down", 16, (15,)),
        ("conformer.conv", 24, (15,)),
        ("conformer.act", 24, (15,)),
    ]
    assert any(
        line.startswith("'encoder' returns a tensor (2, 15, 24), which may be (B, N, C)") for line in points.refused
    )


def test_tokens_of_an_image_model_are_no_sequence() -> None:
    """As in a ViT, also where a sequence of another shape has been there before."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), Transposed(), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()
    )
    assert [point.path for point in insertion_points(model, torch.zeros(2, 3, 8, 16))] == ["0"]
    model.insert(2, nn.BatchNorm1d(8))
    assert [point.path for point in insertion_points(model, torch.zeros(2, 3, 8, 12))] == ["0", "2"]


def test_as_many_channels_as_positions_are_in_doubt() -> None:
    model = nn.Sequential(nn.Conv1d(3, 16, 1), nn.ReLU(), Transposed())
    x = torch.randn(2, 3, 16)
    assert [point.path for point in insertion_points(model, x)] == ["0"]
    with pytest.raises(
        ValueError, match=r"'1' returns a tensor \(2, 16, 16\), which may be \(B, N, C\): if it is \(B, C, L\), insert"
    ):
        insert_self_attention(model, "1", example_input=x)
    with pytest.raises(ValueError, match=r"which may be \(B, N, C\)"):
        insert_self_attention(model, "1", example_input=x, attention=lambda channels: nn.Identity())
    assert not inserted(model)
    before = model(x)
    insert_self_attention(model, "1", example_input=x, attention=SelfAttention1d.official)
    assert torch.equal(model(x), before)
    # With another length it is certain.
    insert_self_attention(model, "0", example_input=x[..., :15])


def test_one_call_of_several_in_doubt_is_enough() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv1d(3, 16, 1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.act(self.conv(x)).transpose(1, 2)[:, :16])  # (B, 16, 20), then (B, 16, 16)

    with pytest.raises(ValueError, match=r"'act' returns a tensor \(2, 16, 16\), which may be"):
        insert_self_attention(Twice(), "act", example_input=torch.zeros(2, 3, 20))


@pytest.mark.parametrize("dims", [2, 3])
def test_a_map_without_a_batch_is_not_one_of_fewer_dimensions(dims: int) -> None:
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims](3, 8, 1)
    x = torch.zeros(3, *range(4, 4 + dims))
    with pytest.raises(ValueError, match=r"'0' returns a tensor \(8, 4, .*\) without a batch, expected a feature map"):
        insert_self_attention(nn.Sequential(conv), "0", example_input=x)
    assert not insertion_points(nn.Sequential(conv), x)


# --- the layer that is inserted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", LAYERS)
def test_the_layer_has_the_dimension_of_the_map(dims: int) -> None:
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    for example in (torch.zeros(2, 3, *range(4, 4 + dims)), None):
        model = Wrapped(conv(3, 8, 1), nn.GroupNorm(2, 8))
        insert_self_attention(model, ["model.0", "model.1"], example_input=example)
        assert [type(layer) for layer in inserted(model)] == [LAYERS[dims]] * 2


@pytest.mark.parametrize("example", [torch.zeros(2, 3, 4, 5, 6), None])
def test_an_attention_of_another_dimension_is_an_error(example: Tensor | None) -> None:
    model = nn.Sequential(nn.Conv3d(3, 8, 1))
    with pytest.raises(
        ValueError,
        match=r"'0' returns a feature map \(B, C, D, H, W\), but attention makes a SelfAttention2d, which expects",
    ):
        insert_self_attention(model, "0", example_input=example, attention=SelfAttention2d.paper)
    assert not inserted(model)


def test_one_layer_cannot_serve_two_dimensions() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.act(x).unsqueeze(4))

    with pytest.raises(
        ValueError, match=r"'act' runs 2 times, with \(B, 3, D, H, W\) on cpu .* and \(B, 3, H, W\) on cpu"
    ):
        insert_self_attention(Mixed(), "act", example_input=torch.zeros(2, 3, 4, 5))


# --- what modules declare ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Conv1d(3, 6, 1), SelfAttention1d),
        (nn.ConvTranspose3d(3, 6, 2), SelfAttention3d),
        (nn.BatchNorm1d(6), SelfAttention1d),
        (nn.BatchNorm3d(6), SelfAttention3d),
        (SelfAttention3d(6), SelfAttention3d),
        (spectral_norm(nn.Conv1d(3, 6, 1)), SelfAttention1d),
        (nn.Sequential(nn.Conv1d(3, 6, 1), nn.InstanceNorm1d(9), nn.ReLU(), nn.MaxPool1d(2)), SelfAttention1d),
        (nn.Sequential(nn.Conv3d(3, 6, 1), nn.GroupNorm(2, 6), nn.Dropout3d()), SelfAttention3d),
        (nn.Sequential(nn.Conv3d(3, 6, 1), nn.SyncBatchNorm(6)), SelfAttention3d),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value.__name__,
)
def test_channels_and_dimension_that_a_module_declares(module: nn.Module, kind: type[nn.Module]) -> None:
    model = insert_self_attention(nn.Sequential(module), "0")
    (layer,) = inserted(model)
    assert (type(layer), layer.channels) == (kind, 6)


@pytest.mark.parametrize("others", [[], [nn.Conv1d(3, 6, 1), nn.Conv2d(3, 6, 1)]], ids=["none", "two"])
@pytest.mark.parametrize("norm", [lambda: nn.GroupNorm(2, 6), lambda: nn.SyncBatchNorm(6)], ids=["group", "sync"])
def test_a_dimension_that_nothing_declares(norm: Callable[[], nn.Module], others: list[nn.Module]) -> None:
    model = nn.Sequential(norm(), *others)
    with pytest.raises(
        ValueError, match=r"'0' does not declare the dimension of its feature map: give an example_input"
    ):
        insert_self_attention(model, "0")
    insert_self_attention(model, "0", attention=SelfAttention3d)
    assert type(inserted(model)[0]) is SelfAttention3d
