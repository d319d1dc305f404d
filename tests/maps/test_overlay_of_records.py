"""Overlays of records: of their own sizes, of a sequence as a strip, and none of a volume."""

from __future__ import annotations

import pytest
import torch

from torch_sagan import AttentionRecord, SelfAttention2d, attention_overlay, record_attention


def test_a_record_knows_its_sizes() -> None:
    network = SelfAttention2d.official(8)
    with record_attention(network) as records, torch.no_grad():
        network(torch.randn(2, 8, 5, 14))
    record = records[""][0]
    images = torch.rand(2, 3, 30, 30)  # the size of the feature map, 5×14, does not follow from the image
    overlay = attention_overlay(images, record, [(3, 4), (29, 29)])
    told = attention_overlay(images, record.attention, [(3, 4), (29, 29)], query_size=(5, 14), key_size=(2, 7))
    assert torch.equal(overlay, told)
    with pytest.raises(ValueError, match="record knows its sizes"):
        attention_overlay(images, record, (3, 4), key_size=(2, 7))


def test_a_sequence_is_drawn_as_a_strip() -> None:
    """Like a map of two rows of queries that share their keys. The thirteenth position has no key."""
    attention = torch.randn(2, 13, 6).mul(2).softmax(2)
    images, queries = torch.rand(2, 3, 16, 26), [(3, 4), (15, 25)]
    strip = attention_overlay(images, AttentionRecord(attention, (13,), (6,)), queries)
    plane = AttentionRecord(attention.repeat(1, 2, 1), (2, 13), (1, 6))
    assert torch.equal(strip, attention_overlay(images, plane, queries))


def test_a_volume_is_refused() -> None:
    record = AttentionRecord(torch.ones(1, 8, 8), (2, 2, 2), (2, 2, 2))
    with pytest.raises(ValueError, match=r"in a volume of 2×2×2 positions cannot be drawn over an image: draw a slice"):
        attention_overlay(torch.zeros(1, 3, 16, 16), record, (0, 0))


def test_a_record_can_be_made_by_hand() -> None:
    record = AttentionRecord(torch.rand(1, 8, 2), (2, 4), (1, 2))
    assert attention_overlay(torch.zeros(1, 3, 16, 16), record, (15, 15)).shape == (1, 3, 16, 16)
