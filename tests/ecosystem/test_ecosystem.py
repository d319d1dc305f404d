"""The rest of PyTorch around the layers: one battery over all of them, one test for each row of docs/ecosystem.md."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import re
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from torch_sagan import (
    SAGANDiscriminator,
    SAGANGenerator,
    SelfAttention2d,
    SpectralNorm,
    hinge_discriminator_loss,
    hinge_generator_loss,
    recalibrate,
    reset_power_iteration,
    spectral_norm,
    spectral_norms,
)

# The exporter of torch 2.5 fails on batch norm with the onnxscript of today.
ONNX_EXPORTS = (
    hasattr(torch.compiler, "is_exporting")
    and find_spec("onnxscript") is not None
    and find_spec("onnxruntime") is not None
)

PAGE = Path(__file__).parents[2] / "docs" / "ecosystem.md"


class Subject(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    num_classes: int | None = None


SUBJECTS = {
    "attention": Subject(lambda: SelfAttention2d(16), (16, 6, 5)),
    # So many positions that the attention matrix is not materialised.
    "attention in tiles": Subject(lambda: SelfAttention2d(8), (8, 33, 33)),
    "official attention": Subject(lambda: SelfAttention2d.official(16), (16, 6, 5)),
    "l2 attention": Subject(lambda: SelfAttention2d(16, similarity="l2"), (16, 6, 5)),
    "spectral norm": Subject(lambda: spectral_norm(nn.Conv2d(4, 6, 3)), (4, 6, 5)),
    "torch's spectral norm": Subject(lambda: spectral_norm(nn.Conv2d(4, 6, 3), implementation="torch"), (4, 6, 5)),
    "generator": Subject(lambda: SAGANGenerator(16, z_dim=8, base_channels=8), (8,)),
    "residual generator with classes": Subject(
        lambda: SAGANGenerator(16, z_dim=8, base_channels=8, architecture="resnet", num_classes=5), (8,), 5
    ),
    "discriminator": Subject(lambda: SAGANDiscriminator(16, base_channels=8), (3, 16, 16)),
    "discriminator with classes": Subject(
        lambda: SAGANDiscriminator(16, base_channels=8, num_classes=5), (3, 16, 16), 5
    ),
    "residual discriminator with classes": Subject(
        lambda: SAGANDiscriminator(16, base_channels=8, architecture="resnet", num_classes=5), (3, 16, 16), 5
    ),
}
ATTENTION = [name for name in SUBJECTS if "attention" in name]
LAYERS = ["spectral norm", "torch's spectral norm"]
NETWORKS = [name for name in SUBJECTS if name not in ATTENTION + LAYERS]
NORMALIZED = LAYERS + NETWORKS

subjects = pytest.mark.parametrize("subject", SUBJECTS)
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
# Parts of torch that its compiler, exporters and forward mode use themselves, and that it has deprecated.
jit_is_deprecated = pytest.mark.filterwarnings("ignore:`torch.jit")
functions_are_deprecated = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
leaves_are_deprecated = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


def build(subject: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The subject with gamma ≠ 0, and with u and v that lag behind the weights, so that iterations have an effect."""
    module = SUBJECTS[subject].make().to(dtype)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, SelfAttention2d):
                part.gamma.fill_(0.7)
            if isinstance(part, parametrize.ParametrizationList):
                part.original.add_(0.5 * part.original.std() * torch.randn_like(part.original))
    return module


def inputs(subject: str, batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    _, shape, num_classes = SUBJECTS[subject]
    x = torch.randn(batch, *shape, dtype=dtype)
    return (x,) if num_classes is None else (x, torch.randint(num_classes, (batch,)))


def score(y: Tensor) -> Tensor:
    """One number for each sample, of whatever a subject returns."""
    return y.flatten(1).square().mean(1) if y.ndim > 1 else y


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_close(actual: object, expected: object, *, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    """Equal but for the order of summation, in float64 unless other tolerances are given."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def worst_norm(module: nn.Module) -> float:
    """How far the largest singular value of any normalised weight is from 1."""
    return max(abs(norm - 1) for norm in spectral_norms(module).values())


# --- compiling and exporting ---------------------------------------------------------------------------------------


def assert_compiled_equals_eager(
    subject: str,
    training: bool,
    compiler: Callable[[nn.Module], nn.Module],
    sizes: list[tuple[int, int]],
    dtype: torch.dtype = torch.float64,
    **tolerances: float,
) -> None:
    """In outputs, gradients and buffers, for steps of two passes before one backward."""
    eager = build(subject, dtype).train(training)
    plain = copy.deepcopy(eager)
    compiled = compiler(plain)
    for step in sizes:
        batches = [inputs(subject, size, dtype) for size in step]
        expected, actual = ([module(*batch) for batch in batches] for module in (eager, compiled))
        assert_close(actual, expected, **tolerances)
        losses = (sum(score(y).sum() for y in outputs) for outputs in (expected, actual))
        expected, actual = (gradients(module, loss) for module, loss in zip((eager, plain), losses, strict=True))
        assert_close(actual, expected, **tolerances)
        assert_close(buffers(plain), buffers(eager), **tolerances)


@pytest.mark.slow  # tracing takes seconds
@jit_is_deprecated
@functions_are_deprecated
@pytest.mark.parametrize(
    ("subject", "training"),
    [(name, True) for name in SUBJECTS if name != "residual discriminator with classes"]
    + [(name, False) for name in ("attention", "spectral norm", "generator")],
)
def test_compile(subject: str, training: bool) -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        compiled: Callable[..., object] = torch._dynamo.lookup_backend("aot_eager")(graph, examples)
        return compiled

    def compiler(module: nn.Module) -> nn.Module:
        return torch.compile(module, fullgraph=True, backend=backend)

    assert_compiled_equals_eager(subject, training, compiler, [(2, 3), (5, 2)])
    assert len(graphs) <= 2  # one for the first batch size, one for all others


@pytest.mark.slow  # the C++ compiler takes seconds
@jit_is_deprecated
@functions_are_deprecated
@pytest.mark.parametrize("subject", ["official attention", "spectral norm", "discriminator"])
def test_compile_with_inductor(subject: str) -> None:
    torch._dynamo.reset()
    # In float32, since torch 2.5 writes C++ for softmax's backward in float64 that no compiler takes.
    compiler = partial(torch.compile, fullgraph=True)
    assert_compiled_equals_eager(subject, True, compiler, [(2, 2)], torch.float32, rtol=1e-4, atol=1e-5)


@leaves_are_deprecated
@subjects
def test_export(subject: str) -> None:
    module = build(subject).eval()
    example = inputs(subject, 3)
    batch = torch.export.Dim("batch", min=1, max=1024)  # without an end, torch 2.5 objects to the largest integer
    program = torch.export.export(module, example, dynamic_shapes=tuple({0: batch} for _ in example)).module()
    for size in (1, 2, 7):
        x = inputs(subject, size)
        assert_close(program(*x), module(*x))


# The exporter uses a deprecated part of torch, and says that inputs of one batch size share its name.
@pytest.mark.slow  # the exporter takes seconds
@leaves_are_deprecated
@pytest.mark.filterwarnings("ignore:.*axis name:UserWarning")
@pytest.mark.parametrize(
    "subject",
    ["attention in tiles", "official attention", *LAYERS, "generator", "discriminator with classes"],
)
def test_onnx(subject: str, tmp_path: Path) -> None:
    if not ONNX_EXPORTS:
        pytest.skip("needs torch 2.7, onnxscript and onnxruntime")
    import onnxruntime

    module = build(subject, torch.float32).eval()
    example = inputs(subject, 3, torch.float32)
    batch = torch.export.Dim("batch")
    path = tmp_path / "module.onnx"
    shapes = tuple({0: batch} for _ in example)
    torch.onnx.export(module, example, path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in (1, 2, 7):
        x = inputs(subject, size, torch.float32)
        fed = {entry.name: tensor.numpy() for entry, tensor in zip(session.get_inputs(), x, strict=True)}
        (y,) = session.run(None, fed)
        torch.testing.assert_close(torch.from_numpy(y), module(*x).detach(), rtol=1e-4, atol=1e-5)


@subjects
def test_make_fx(subject: str) -> None:
    """A trace of plain operators, of a pass with other values, and labels, than it is called with."""
    module = build(subject).eval()
    traced = make_fx(module)(*inputs(subject, 2))
    x = inputs(subject, 2)
    assert_close(traced(*x), module(*x))


@subjects
@modes
def test_fake_tensors(subject: str, training: bool) -> None:
    """Shapes without values. (Made under the mode, since torch cannot convert a module of fake tensors by ``to``.)"""

    def shape() -> torch.Size:
        y: Tensor = SUBJECTS[subject].make().train(training)(*inputs(subject, 3, torch.float32))
        return y.shape

    expected = shape()
    with FakeTensorMode():
        assert shape() == expected


@jit_is_deprecated
@subjects
def test_script_fails(subject: str) -> None:
    """With an error of torch's own: keyword-only arguments and parametrizations are no TorchScript."""
    errors = torch.jit.frontend.NotSupportedError, ValueError
    with pytest.raises(errors, match=r"keyword-only|Unknown type annotation|not supported"):
        torch.jit.script(build(subject))


@jit_is_deprecated
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the checks of shapes are not in the trace
@subjects
def test_trace(subject: str) -> None:
    module = build(subject).eval()
    saved = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, inputs(subject, 3)), saved)
    saved.seek(0)
    traced = torch.jit.load(saved)
    for size in (1, 5):
        x = inputs(subject, size)
        assert_close(traced(*x), module(*x))


class SaganLeaves(torch.fx.Tracer):
    """The tracer of the page."""

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return isinstance(module, (SAGANGenerator, SAGANDiscriminator)) or super().is_leaf_module(module, path)


class Holder(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        y: Tensor = self.module(x) if labels is None else self.module(x, labels)
        return 2 * y


@subjects
def test_symbolic_trace(subject: str) -> None:
    """Layers are traced; networks, which look at labels and sizes, are leaves."""
    module = build(subject).eval()
    if subject in NETWORKS:
        with pytest.raises(torch.fx.proxy.TraceError, match="control flow"):
            torch.fx.symbolic_trace(module)
        module = Holder(module)
        traced = torch.fx.GraphModule(module, SaganLeaves().trace(module))
    else:
        traced = torch.fx.symbolic_trace(module)
    for size in (1, 5):
        x = inputs(subject, size)
        assert_close(traced(*x), module(*x))  # a trace calls three projections where the layer makes one convolution


# --- precision and memory ------------------------------------------------------------------------------------------

# Relative to the largest output, after up to a dozen layers: some roundings of 2**-8 and of 2**-11.
roundings = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.008)])


@roundings
@subjects
def test_autocast(subject: str, dtype: torch.dtype, tolerance: float) -> None:
    module = build(subject, torch.float32)
    twin = copy.deepcopy(module)
    x = inputs(subject, 3, torch.float32)
    expected = twin(*x)
    with torch.autocast("cpu", dtype=dtype):
        y = module(*x)
    assert (y.float() - expected).abs().max() <= tolerance * expected.abs().max()
    assert not torch.equal(y.float(), expected)
    for name, gradient in gradients(module, score(y.float()).sum()).items():
        assert gradient.dtype == torch.float32, name
        assert gradient.isfinite().all(), name
    for name, buffer in buffers(module).items():
        if name.endswith(("_u", "_v")) and "torch" not in subject:  # the iteration is outside of autocast
            assert torch.equal(buffer, buffers(twin)[name]), name


@roundings
@subjects
def test_half_precision(subject: str, dtype: torch.dtype, tolerance: float) -> None:
    module = build(subject, torch.float32)
    x = inputs(subject, 3, torch.float32)
    expected = copy.deepcopy(module)(*x)
    low = [t.to(dtype) if t.is_floating_point() else t for t in x]
    y = module.to(dtype)(*low)
    assert y.dtype == dtype
    assert (y.float() - expected).abs().max() <= tolerance * expected.abs().max()
    for name, gradient in gradients(module, score(y).sum()).items():
        assert gradient.dtype == dtype, name
        assert gradient.isfinite().all(), name


@subjects
def test_double(subject: str) -> None:
    module = build(subject, torch.float32)
    x = inputs(subject, 3)
    expected = copy.deepcopy(module)(x[0].float(), *x[1:])
    y = module.double()(*x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y.float(), expected, rtol=1e-4, atol=1e-5)  # float32 over a dozen layers
    assert all(gradient.dtype == torch.float64 for gradient in gradients(module, score(y).sum()).values())


@subjects
def test_channels_last(subject: str) -> None:
    """Same results, and images stay in the format."""
    module = build(subject)
    twin = copy.deepcopy(module).to(memory_format=torch.channels_last)
    x = inputs(subject, 3)
    y, expected = twin(*(t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for t in x)), module(*x)
    assert_close(y, expected)
    assert_close(gradients(twin, score(y).sum()), gradients(module, score(expected).sum()))
    assert y.ndim != 4 or y.is_contiguous(memory_format=torch.channels_last)


@subjects
def test_activation_checkpointing_in_evaluation(subject: str) -> None:
    module = build(subject).eval()
    x = inputs(subject, 3)
    y, expected = checkpoint(module, *x, use_reentrant=False), module(*x)
    assert torch.equal(y, expected)
    assert_close(gradients(module, score(y).sum()), gradients(module, score(expected).sum()))


@subjects
def test_activation_checkpointing_in_training(subject: str) -> None:
    """Checkpointing repeats the pass with all its effects: the gradient equals bitwise that of a second pass."""
    module = build(subject)
    twin = copy.deepcopy(module)
    x = inputs(subject, 3)
    y = checkpoint(module, *x, use_reentrant=False)
    first, second = twin(*x), twin(*x)
    assert torch.equal(y, first)
    incoming = torch.randn_like(y)
    actual, expected = gradients(module, (y * incoming).sum()), gradients(twin, (second * incoming).sum())
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert all(torch.equal(actual, expected) for actual, expected in zip(module.buffers(), twin.buffers(), strict=True))


@contextlib.contextmanager
def iteration_stopped(module: nn.Module) -> Iterator[None]:
    norms = [part for part in module.modules() if isinstance(part, SpectralNorm) and part.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


@pytest.mark.parametrize("subject", [name for name in SUBJECTS if "torch" not in name])
def test_activation_checkpointing_with_the_iteration_stopped(subject: str) -> None:
    """The workaround of the page: the repeated pass uses u and v as the first one left them."""
    module = build(subject)
    twin = copy.deepcopy(module)
    x = inputs(subject, 3)
    contexts = contextlib.nullcontext(), iteration_stopped(module)
    y, expected = checkpoint(module, *x, use_reentrant=False, context_fn=lambda: contexts), twin(*x)
    assert torch.equal(y, expected)
    assert_close(gradients(module, score(y).sum()), gradients(twin, score(expected).sum()))
    for name, buffer in buffers(module).items():
        if name.endswith(("_u", "_v")):
            assert torch.equal(buffer, buffers(twin)[name]), name
    assert all(part.training for part in module.modules())


# --- copies and files ----------------------------------------------------------------------------------------------


@subjects
def test_deepcopy(subject: str) -> None:
    """The copy shares nothing with the original, whether it trains or not."""
    module = build(subject)
    state = copy.deepcopy(module.state_dict())
    twin = copy.deepcopy(module)
    x = inputs(subject, 3)
    for _ in range(2):
        twin(*x)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    twin.load_state_dict(state)
    assert torch.equal(twin(*x), module(*x))


@pytest.mark.parametrize("packing", ["torch.save", "safetensors"])
@subjects
def test_state_dict_in_a_file(subject: str, packing: str, tmp_path: Path) -> None:
    module = build(subject)
    module(*inputs(subject, 3))
    path = tmp_path / "weights"
    if packing == "torch.save":
        torch.save(module.state_dict(), path)
        state = torch.load(path, weights_only=True)
    else:
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file(module.state_dict(), path)
        state = safetensors.load_file(path)
    loaded = SUBJECTS[subject].make().double()
    loaded.load_state_dict(state)
    x = inputs(subject, 3)
    assert torch.equal(loaded(*x), module(*x))


@subjects
def test_safetensors_of_a_channels_last_module(subject: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    module = build(subject).to(memory_format=torch.channels_last)
    if subject in ATTENTION:  # both formats of a 1×1 kernel are the same memory
        safetensors.save_file(module.state_dict(), tmp_path / "weights")
    else:
        with pytest.raises(ValueError, match="contiguous"):
            safetensors.save_file(module.state_dict(), tmp_path / "weights")
    state = {name: value.contiguous() for name, value in module.state_dict().items()}
    safetensors.save_file(state, tmp_path / "weights")
    assert all(torch.equal(value, state[name]) for name, value in safetensors.load_file(tmp_path / "weights").items())


@subjects
def test_pickled_module(subject: str) -> None:
    """The plain layer is a plain module; under a parametrization torch refuses, whichever it is."""
    module = build(subject)
    if subject in ATTENTION:
        x = inputs(subject, 3)
        for loaded in (pickle.loads(pickle.dumps(module)), _saved_whole(module)):
            assert torch.equal(loaded(*x), module(*x))
    else:
        for dump in (pickle.dumps, _saved_whole):
            with pytest.raises(RuntimeError, match=r"only supported through state_dict\(\)"):
                dump(module)


def _saved_whole(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("assign", [False, True])
@subjects
def test_meta_device(subject: str, assign: bool) -> None:
    """Made without memory, asked for its shapes, and loaded later."""
    module = build(subject)
    x = inputs(subject, 3)
    with torch.device("meta"):
        empty = SUBJECTS[subject].make().double()
        assert all(value.is_meta for value in empty.state_dict().values())
        shape = empty(*(t.to("meta") for t in x)).shape
    if not assign:
        empty = empty.to_empty(device="cpu")
    empty.load_state_dict(copy.deepcopy(module.state_dict()), assign=assign)
    y = empty(*x)
    assert y.shape == shape
    assert torch.equal(y, module(*x))


def test_state_dict_of_another_variant() -> None:
    """An error that names every key: missing, unexpected, of other sizes. ``strict=False`` forgives the first two."""
    default, official = SelfAttention2d(16), SelfAttention2d.official(16)
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*out\.weight.*Unexpected.*query\.bias.*value\.weight.*16.*8"):
        official.load_state_dict(default.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for value\.weight"):
        official.load_state_dict(default.state_dict(), strict=False)
    projected = SelfAttention2d(16, out_projection=True)
    missing, unexpected = projected.load_state_dict(default.state_dict(), strict=False)
    assert missing == ["out.weight", "out.bias"]
    assert unexpected == []
    assert torch.equal(projected.value.weight, default.value.weight)


def test_state_dict_of_a_plain_layer() -> None:
    plain, normalized = nn.Conv2d(4, 6, 3), spectral_norm(nn.Conv2d(4, 6, 3))
    with pytest.raises(RuntimeError, match=r'(?s)Missing.*parametrizations\.weight\.original.*Unexpected.*"weight"'):
        normalized.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("subject", NORMALIZED)
def test_state_dicts_of_both_implementations(subject: str) -> None:
    """Strict, in both directions."""

    def theirs() -> nn.Module:
        module = build(subject)
        for part in list(module.modules()):
            if parametrize.is_parametrized(part, "weight"):
                dim = part.parametrizations.weight[0].dim
                parametrize.remove_parametrizations(part, "weight", leave_parametrized=False)
                spectral_norm(part, dim=dim, implementation="torch")
        return module

    x = inputs(subject, 3)
    for source, destination in [(build(subject), theirs()), (theirs(), build(subject))]:
        source(*x)
        destination.load_state_dict(source.state_dict(), strict=True)
        assert_close(destination.eval()(*x), source.eval()(*x))


# --- several processes ---------------------------------------------------------------------------------------------


PARALLEL = [name for name in SUBJECTS if name not in ("attention", "attention in tiles", "discriminator with classes")]


def two_processes(work: Callable[[int], None], tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_in_a_group, args=(work, str(tmp_path / "store")), nprocs=2)


def _in_a_group(rank: int, work: Callable[[int], None], store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    work(rank)
    dist.destroy_process_group()


def _train_in_parallel(rank: int) -> None:
    for subject in PARALLEL:
        torch.manual_seed(0)
        alone = build(subject)
        module = copy.deepcopy(alone)
        parallel = DistributedDataParallel(module)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (alone, parallel)]
        for _ in range(3):
            real, fake = inputs(subject, 4), inputs(subject, 4)
            shares = [[t[rank::2] for t in batch] for batch in (real, fake)]
            for m, batches, optimizer in zip((alone, parallel), ((real, fake), shares), optimizers, strict=True):
                optimizer.zero_grad()
                if "generator" in subject:  # one pass a step; batch norm of older torch bears no second one
                    hinge_generator_loss(score(m(*batches[0]))).backward()
                else:
                    hinge_discriminator_loss(*(score(m(*batch)) for batch in batches)).backward()
                optimizer.step()
        if "generator" not in subject:  # batch statistics are each process's own
            assert_close(module.state_dict(), alone.state_dict())
        _assert_equal_on_both_ranks(
            {name: value for name, value in module.state_dict().items() if "running" not in name}
        )
        parallel.eval()(*shares[0])  # a pass in evaluation brings the running statistics in line as well
        _assert_equal_on_both_ranks(module.state_dict())


def _assert_equal_on_both_ranks(state: dict[str, Tensor]) -> None:
    states: list[dict[str, Tensor]] = [{}, {}]
    dist.all_gather_object(states, state)
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.slow  # starting two processes takes seconds
def test_distributed_data_parallel(tmp_path: Path) -> None:
    """A discriminator's steps, real and fake in passes of their own, equal those of one process on the whole batch."""
    two_processes(_train_in_parallel, tmp_path)


def _train_in_shards(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (2,))
    for subject in PARALLEL:
        torch.manual_seed(0)
        alone = build(subject)
        module = copy.deepcopy(alone)
        for layer in [*getattr(module, "blocks", []), *getattr(module, "attention", nn.ModuleDict()).values()]:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        assert all(isinstance(parameter, dist.tensor.DTensor) for parameter in module.parameters())
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (alone, module)]
        for _ in range(3):
            real, fake = inputs(subject, 4), inputs(subject, 4)
            for m, optimizer in zip((alone, module), optimizers, strict=True):
                optimizer.zero_grad()
                hinge_discriminator_loss(score(m(*real)), score(m(*fake))).backward()
                optimizer.step()
        state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
        if rank == 0:
            assert_close(state, alone.state_dict())
        if subject in NORMALIZED:
            module(*inputs(subject, 4))
            alone(*inputs(subject, 4))
            for part in module.modules():  # outside of a pass, whole weights are there when they are asked for
                if hasattr(part, "unshard"):
                    part.unshard()
            assert spectral_norms(module) == pytest.approx(spectral_norms(alone))


@pytest.mark.slow  # starting two processes takes seconds
def test_fully_sharded_data_parallel(tmp_path: Path) -> None:
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("fully_shard is public from torch 2.6 on")
    two_processes(_train_in_shards, tmp_path)


# --- averages ------------------------------------------------------------------------------------------------------


def averaged(subject: str, *, use_buffers: bool) -> tuple[nn.Module, AveragedModel]:
    """The subject after some steps, and the average over them, which lags behind."""
    module = build(subject)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=use_buffers)
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-3, betas=(0.0, 0.9))
    for _ in range(30):
        y = module(*inputs(subject, 4))
        optimizer.zero_grad()
        (y - torch.randn_like(y)).square().mean().backward()
        optimizer.step()
        average.update_parameters(module)
    return module, average


@subjects
def test_averaged_model(subject: str) -> None:
    """Parameters are averaged, buffers copied; sigma of the average is near, and exact after recalibration."""
    module, average = averaged(subject, use_buffers=False)
    source, copied = dict(module.named_buffers()), dict(average.module.named_buffers())
    assert source.keys() == copied.keys()
    for name, buffer in source.items():
        assert torch.equal(buffer, copied[name])
        assert buffer is not copied[name]
    for name, parameter in average.module.named_parameters():
        assert not torch.equal(parameter, module.get_parameter(name)), name
    average.eval()
    assert average(*inputs(subject, 4)).isfinite().all()
    if subject in NORMALIZED:
        assert worst_norm(average.module) < 0.3
        recalibrate(average, [inputs(subject, 4)] if "generator" in subject else None)
        assert worst_norm(average.module) < 1e-9  # rounding in float64


@pytest.mark.parametrize("subject", LAYERS)
def test_averaged_buffers_are_wrong(subject: str) -> None:
    """The average of unit vectors is not a unit vector: ``use_buffers=True`` is not for u and v."""
    _, average = averaged(subject, use_buffers=True)
    vector = average.module.parametrizations.weight[0]._u
    assert abs(vector.norm().item() - 1) > 1e-3  # float64, where a unit vector's is below 1e-15


# --- torch.func ----------------------------------------------------------------------------------------------------


def states(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {name: value.detach() for name, value in module.named_parameters()}, buffers(module)


@modes
@subjects
def test_functional_call_and_grad(subject: str, training: bool) -> None:
    """The buffers are an argument, since training writes to them; they come out as those of a plain pass."""
    module = build(subject).train(training)
    twin = copy.deepcopy(module)
    x = inputs(subject, 3)

    def loss(parameters: dict[str, Tensor], moved: dict[str, Tensor]) -> Tensor:
        return score(functional_call(module, (parameters, moved), x)).sum()

    parameters, moved = states(module)
    assert_close(grad(loss)(parameters, moved), gradients(twin, score(twin(*x)).sum()))
    assert_close(moved, buffers(twin))


@subjects
def test_vmap_of_grad(subject: str) -> None:
    """A gradient for each sample."""
    module = build(subject).eval()
    x = inputs(subject, 3)

    def loss(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        return score(functional_call(module, parameters, tuple(t[None] for t in sample))).sum()

    each = vmap(grad(loss), in_dims=(None, *(0 for _ in x)))(states(module)[0], *x)
    for i in range(3):
        expected = gradients(module, score(module(*(t[i : i + 1] for t in x))).sum())
        assert_close({name: value[i] for name, value in each.items()}, expected)


@subjects
def test_vmap_over_an_ensemble(subject: str) -> None:
    modules = [build(subject).eval() for _ in range(3)]
    x = inputs(subject, 2)
    if subject in LAYERS:  # each parametrized layer has a class of its own, which torch wants to be one
        with pytest.raises(RuntimeError, match="same class"):
            stack_module_state(modules)
        modules = [nn.Sequential(module) for module in modules]
    parameters, moved = stack_module_state(modules)
    base = copy.deepcopy(modules[0]).to("meta")
    together = vmap(lambda p, b: functional_call(base, (p, b), x))(parameters, moved)
    assert_close(together, torch.stack([module(*x) for module in modules]))


@jit_is_deprecated
@pytest.mark.parametrize("way", ["torch.func.jvp", "dual tensors"])
@subjects
def test_forward_mode(subject: str, way: str) -> None:
    """Along a direction of input and parameters at once, against reverse mode taken twice."""
    module = build(subject).eval()
    x, *labels = inputs(subject, 2)
    names, values = zip(*states(module)[0].items(), strict=True)

    def call(image: Tensor, *parameters: Tensor) -> Tensor:
        y: Tensor = functional_call(module, dict(zip(names, parameters, strict=True)), (image, *labels))
        return y

    point = (x, *values)
    direction = tuple(torch.randn_like(value) for value in point)
    if way == "torch.func.jvp":
        _, derivative = jvp(call, point, direction)
    else:
        with forward_ad.dual_level():
            y = call(*(forward_ad.make_dual(*pair) for pair in zip(point, direction, strict=True)))
            derivative = forward_ad.unpack_dual(y).tangent
    assert_close(derivative, torch.autograd.functional.jvp(call, point, direction)[1])


# --- hooks and initialisation --------------------------------------------------------------------------------------


@subjects
def test_hooks(subject: str) -> None:
    module = build(subject)
    x, *labels = inputs(subject, 3)
    seen: dict[str, object] = {}
    module.register_forward_pre_hook(lambda _, arguments: (2 * arguments[0], *arguments[1:]))
    module.register_forward_hook(lambda _, arguments, y: seen.update(x=arguments[0]) or 3 * y)
    module.register_full_backward_hook(lambda _, d_x, d_y: seen.update(d_x=d_x[0], d_y=d_y[0]))
    twin = copy.deepcopy(module)
    for name in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks"):
        getattr(twin, name).clear()
    x.requires_grad_()
    doubled = (2 * x.detach()).requires_grad_()
    y, expected = module(x, *labels), twin(doubled, *labels)
    assert torch.equal(y, 3 * expected)
    assert torch.equal(seen["x"], doubled)
    incoming = torch.randn_like(y)
    y.backward(incoming)
    expected.backward(3 * incoming)
    assert_close(seen["d_x"], doubled.grad)
    assert_close(x.grad, 2 * doubled.grad)
    assert_close(seen["d_y"], incoming)


def dcgan_init(module: nn.Module) -> None:
    """The usual initialisation of a DCGAN, as it is often written."""
    name = type(module).__name__
    if "Conv" in name:
        module.weight.data.normal_(0.0, 0.02)
    elif "BatchNorm" in name:
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def init_of_the_page(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        normalized = parametrize.is_parametrized(module, "weight")
        nn.init.normal_(module.parametrizations.weight.original if normalized else module.weight, 0.0, 0.02)


def originals(module: nn.Module) -> list[Tensor]:
    return [part.original for part in module.modules() if isinstance(part, parametrize.ParametrizationList)]


def test_initialization_before_the_norm() -> None:
    layer = nn.Conv2d(64, 64, 3).apply(dcgan_init)
    spectral_norm(layer)
    assert originals(layer)[0].std().item() == pytest.approx(0.02, rel=0.1)
    assert worst_norm(layer.eval()) < 0.1


@pytest.mark.parametrize("subject", ["spectral norm", "torch's spectral norm", "generator", "discriminator"])
def test_initialization_after_the_norm_is_lost(subject: str) -> None:
    """The weight is computed, so values written into it are lost without an error, as with torch's own norm."""
    module = build(subject)
    before = [original.clone() for original in originals(module)]
    module.apply(dcgan_init)
    assert all(torch.equal(*pair) for pair in zip(originals(module), before, strict=True))
    for part in module.modules():
        if parametrize.is_parametrized(part, "weight"):
            nn.init.normal_(part.weight, 0.0, 0.02)
    assert all(torch.equal(*pair) for pair in zip(originals(module), before, strict=True))


@pytest.mark.parametrize("subject", ["spectral norm", "generator", "discriminator"])
def test_initialization_of_the_original(subject: str) -> None:
    module = build(subject).apply(init_of_the_page)
    assert all(original.std().item() == pytest.approx(0.02, rel=0.2) for original in originals(module))
    assert worst_norm(module.eval()) > 0.2
    reset_power_iteration(module)
    assert worst_norm(module) < 0.1


def test_initialization_of_conditional_batch_norm() -> None:
    """It has a gamma and a beta for each class, and no ``weight``."""
    with pytest.raises(AttributeError, match="attribute"):
        SAGANGenerator(16, z_dim=8, base_channels=8, num_classes=5).apply(dcgan_init)


# --- the page ------------------------------------------------------------------------------------------------------


def test_the_table_names_every_test() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    named = [name for row in rows for name in re.findall(r"`(test_\w+)`", row)]
    assert len(named) == len(set(named))
    assert set(named) == {name for name in globals() if name.startswith("test_")} - {"test_the_table_names_every_test"}
    columns = {row.count("|") for row in rows}
    assert len(columns) == 1
