"""Generators on the Hugging Face Hub, or in a folder as the Hub has it. Needs ``pip install "torch-sagan[hub]"``.

from torch_sagan.hub import HubGenerator

HubGenerator.of(generator).push_to_hub("me/animals")
generator = HubGenerator.from_pretrained("me/animals")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, hf_hub_download

from torch_sagan.networks.generator import SAGANGenerator
from torch_sagan.networks.generator_file import load_generator, save_generator

__all__ = ["HubGenerator"]

FILE, CONFIG = "generator.safetensors", "config.json"


class HubGenerator(
    SAGANGenerator,
    ModelHubMixin,
    library_name="torch-sagan",
    tags=["gan", "sagan", "self-attention"],
    repo_url="https://github.com/torch-sagan/torch-sagan",
    paper_url="https://arxiv.org/abs/1805.08318",
):
    """A :class:`torch_sagan.SAGANGenerator` with ``from_pretrained``, ``save_pretrained`` and ``push_to_hub``.

    What is stored is the file of :func:`torch_sagan.save_generator`, with its card, and the arguments of the network as
    ``config.json``. ``from_pretrained`` takes a repository's name or a folder, and returns the generator in evaluation
    mode; it runs no code from either.
    """

    @classmethod
    def of(cls, generator: SAGANGenerator) -> HubGenerator:
        """A copy of a generator, with its weights and its card, that can be pushed.

        Raises:
            RuntimeError: for a network that its arguments do not describe, as :func:`torch_sagan.save_generator` does.
        """
        some = next(generator.parameters())
        copy = cls(**generator.arguments, device=some.device, dtype=some.dtype)
        copy.load_state_dict(generator.state_dict())
        copy.card = dict(generator.card)
        return copy.train(generator.training)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_generator(save_directory / FILE, self)
        config = json.dumps(self.arguments, indent=2, sort_keys=True)
        (save_directory / CONFIG).write_text(config, encoding="utf-8")

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **arguments: Any,
    ) -> HubGenerator:
        path = Path(model_id, FILE)
        if not Path(model_id).is_dir():
            path = Path(
                hf_hub_download(
                    model_id,
                    FILE,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        generator = load_generator(path, build=cls)
        assert isinstance(generator, cls)
        # The mixin passes what config.json has; anything else is the caller's.
        changed = [name for name, value in arguments.items() if generator.arguments.get(name, value) != value]
        if changed:
            raise TypeError(f"the network is the file's: {', '.join(changed)} cannot be another than there")
        return generator
