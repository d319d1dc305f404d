"""Generators that draw in the reader's browser: exported to ONNX when the site is built, run by onnxruntime-web.

The directive `draw` of the start page makes the files, and a button that loads them. All of it comes from the site:
the runtime is a package of npm's registry, of a pinned version and checksum, kept in `_build/`. Where it cannot be had,
as without a network, a line stands in the button's place. The workflow that publishes the site wants the generators.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import logging
import shutil
import subprocess
import tarfile
import tempfile
import warnings
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import torch
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.logging import getLogger

from torch_sagan import SAGANGenerator, load_generator, remove_spectral_norm
from torch_sagan.maps.overlay import RAMP

logger = getLogger(__name__)

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
MODULE, BINARY = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
TITLES = {"faces": "Faces", "fashion-mnist": "Clothes"}  # by the data that a card names

OLDEST_TORCH = "2.7"  # whose exporter knows all operators


class Unavailable(Exception):
    """Why this build of the pages has no generators."""


def export(generator: SAGANGenerator, path: Path) -> None:
    """One file: a latent vector (1, z_dim) and, with classes, a label (1,) to the image and every attention map."""
    arguments: tuple[torch.Tensor, ...] = (torch.zeros(1, generator.z_dim),)
    if generator.num_classes is not None:
        arguments += (torch.zeros(1, dtype=torch.long),)
    for part in ("onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(part).setLevel(logging.ERROR)  # they tell each thing that they do
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter uses what torch has deprecated
        torch.onnx.export(
            generator,
            arguments,
            str(path),
            kwargs={"return_attention": True},
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def runtime(cache: Path) -> Path:
    """The package as npm's registry has it, in the cache."""
    archive = cache / f"{PACKAGE}-{VERSION}.tgz"
    if not archive.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise Unavailable("npm is not installed")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", folder]
            command += ["--fetch-retries=1", "--fetch-timeout=60000"]  # a build without a network does not wait long
            try:
                subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
            except (subprocess.SubprocessError, OSError) as error:
                raise Unavailable(f"npm could not fetch {PACKAGE} {VERSION} ({type(error).__name__})") from None
            (packed,) = Path(folder).glob("*.tgz")
            packed.replace(archive)
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode("ascii")
    if digest != SHA512:
        archive.unlink()
        raise Unavailable(f"{archive.name} has another checksum than expected, sha512-{digest}")
    return archive


def unpack(archive: Path, folder: Path) -> None:
    """The two files of the package that a page needs. The larger one is compressed, which not every host does."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as package:
        for name in (MODULE, BINARY):
            file = package.extractfile(f"package/dist/{name}")
            assert file is not None
            content = file.read()
            if name == BINARY:
                # No suffix that a host takes for an encoding of the transfer, which browsers would undo unasked.
                (folder / "ort-wasm.packed").write_bytes(gzip.compress(content, 9, mtime=0))
            else:
                # Without the reference to a source map, which is not here.
                (folder / "ort.mjs").write_bytes(content.partition(b"\n//# sourceMappingURL")[0])


def make(models: Path, cache: Path, site: Path) -> int:
    """Write what the page loads into the site, and return how many bytes that is with the first generator."""
    if torch.__version__ < OLDEST_TORCH:
        raise Unavailable(f"torch {torch.__version__} cannot export them")
    unpack(runtime(cache), site / "_static" / "onnxruntime")
    (site / "models").mkdir(parents=True, exist_ok=True)
    described = []
    for model in sorted(models.glob("*.safetensors"), key=lambda path: (path.stem != "faces", path.stem)):
        generator = load_generator(model)
        file = model.with_suffix(".onnx").name
        export(remove_spectral_norm(generator), site / "models" / file)
        title = TITLES.get(generator.card["data"], model.stem)
        described.append(
            {"file": file, "title": title, "zDim": generator.z_dim, "classes": list(generator.card["classes"])}
        )
    listed = site / "models" / "generators.json"
    listed.write_text(json.dumps({"ramp": RAMP, "generators": described}), encoding="utf-8")
    files = [listed, site / "models" / described[0]["file"], *(site / "_static" / "onnxruntime").iterdir()]
    return sum(path.stat().st_size for path in files)


PAGE = """
<div class="draw" id="draw">
<p><button type="button">Draw</button> <span role="status">Loads {megabytes:.1f} MB from this site.</span></p>
</div>
<script>
{{
  const draw = document.getElementById("draw"), status = draw.querySelector("[role=status]");
  draw.querySelector("button").onclick = (event) => {{
    event.target.disabled = true;
    status.textContent = "Loading …";
    import("./_static/draw.mjs").then((module) => module.start(draw)).catch((error) => {{
      event.target.disabled = false;
      status.textContent = location.protocol === "file:"
        ? "Browsers let a page that is opened as a file load nothing. Serve the folder, as by python -m http.server."
        : `It could not be loaded (${{error.message}}).`;
    }});
  }};
}}
</script>
"""


class Draw(SphinxDirective):
    """The button, and what it loads."""

    has_content: ClassVar[bool] = False

    def run(self) -> list[nodes.Node]:
        app = self.env.app
        if app.builder.format != "html":
            return []
        here = Path(app.srcdir)
        try:
            size = make(here / "models", here / "_build", Path(app.outdir))
        except Unavailable as reason:
            logger.info("the start page draws nothing: %s", reason)
            text = f"<p>This build of the pages has no generator to run: {escape(str(reason))}.</p>"
            return [nodes.raw("", text, format="html")]
        return [nodes.raw("", PAGE.format(megabytes=size / 1e6), format="html")]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("draw", Draw)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
