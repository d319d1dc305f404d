"""Self-attention and spectral normalization for GANs (arXiv:1805.08318)."""

from torch_sagan import functional
from torch_sagan.attention.layer import AttentionRecord, SelfAttention1d, SelfAttention2d, SelfAttention3d
from torch_sagan.losses import (
    gradient_penalty,
    hinge_discriminator_loss,
    hinge_generator_loss,
    relativistic_discriminator_loss,
    relativistic_generator_loss,
    wasserstein_discriminator_loss,
    wasserstein_generator_loss,
    zero_centered_gradient_penalty,
)
from torch_sagan.maps.explorer import AttentionExplorer, explore_attention
from torch_sagan.maps.overlay import attention_overlay, mark_queries
from torch_sagan.maps.record import record_attention
from torch_sagan.networks.conditional import ConditionalBatchNorm2d, ProjectionHead
from torch_sagan.networks.discriminator import SAGANDiscriminator
from torch_sagan.networks.generator import SAGANGenerator
from torch_sagan.networks.generator_file import load_generator, save_generator
from torch_sagan.networks.published.loading import load_published
from torch_sagan.networks.published.loading import load_reference_state_dict as load_reference_state_dict  # deprecated
from torch_sagan.spectral.legacy import convert_legacy_spectral_norm
from torch_sagan.spectral.models import (
    apply_spectral_norm,
    remove_spectral_norm,
    reset_power_iteration,
    spectral_norms,
)
from torch_sagan.spectral.norm import SpectralNorm
from torch_sagan.spectral.operator_norms import OperatorNorm, OperatorNorms, operator_norms
from torch_sagan.spectral.recalibration import recalibrate
from torch_sagan.spectral.registration import spectral_norm
from torch_sagan.surgery.insert import insert_self_attention, remove_self_attention
from torch_sagan.surgery.points import InsertionPoint, InsertionPoints, insertion_points

__version__ = "0.1.0.dev0"

__all__ = [
    "AttentionExplorer",
    "AttentionRecord",
    "ConditionalBatchNorm2d",
    "InsertionPoint",
    "InsertionPoints",
    "OperatorNorm",
    "OperatorNorms",
    "ProjectionHead",
    "SAGANDiscriminator",
    "SAGANGenerator",
    "SelfAttention1d",
    "SelfAttention2d",
    "SelfAttention3d",
    "SpectralNorm",
    "apply_spectral_norm",
    "attention_overlay",
    "convert_legacy_spectral_norm",
    "explore_attention",
    "functional",
    "gradient_penalty",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
    "insert_self_attention",
    "insertion_points",
    "load_generator",
    "load_published",
    "mark_queries",
    "operator_norms",
    "recalibrate",
    "record_attention",
    "relativistic_discriminator_loss",
    "relativistic_generator_loss",
    "remove_self_attention",
    "remove_spectral_norm",
    "reset_power_iteration",
    "save_generator",
    "spectral_norm",
    "spectral_norms",
    "wasserstein_discriminator_loss",
    "wasserstein_generator_loss",
    "zero_centered_gradient_penalty",
]
