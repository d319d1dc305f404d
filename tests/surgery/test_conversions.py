"""Conversions, compilers and tracers after the insertion: the layer stays, or an error says that it is lost."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from existing_models import unet, wake
from torch_sagan import SelfAttention2d, insert_self_attention, record_attention, remove_self_attention


class Quantized(nn.Module):
    """A model to convert: a convolution, its norm and an activation, beside a block that contains another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.act(self.bn(self.conv(x))))


HOSTS = ["conv", "bn", "act", "block", "block.1"]

IMAGES = torch.linspace(-1, 1, 2 * 3 * 9 * 9).sin().view(2, 3, 9, 9)


quantization_is_deprecated = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def attentive(after: str | list[str]) -> nn.Module:
    """With statistics and a gamma for which every layer has an effect."""
    model = Quantized()
    model(2 * torch.randn(8, 3, 9, 9) + 1)
    return wake(insert_self_attention(model, after, example_input=IMAGES)) if after else model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("after", HOSTS)
def test_synchronised_batch_norm_keeps_the_layer(after: str, training: bool) -> None:
    model = attentive(after).train(training)
    twin, keys = copy.deepcopy(model), list(model.state_dict())
    without = remove_self_attention(copy.deepcopy(model))(IMAGES)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted.bn, nn.SyncBatchNorm)
    assert isinstance(converted.block[1], nn.SyncBatchNorm)
    assert list(converted.state_dict()) == keys
    with record_attention(converted) as records:
        converted(IMAGES)
    assert [len(calls) for calls in records.values()] == [1]
    twin(IMAGES)
    expected = twin(IMAGES)
    assert torch.equal(converted(IMAGES), expected)
    assert not torch.allclose(expected, without, atol=1e-3)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_can_be_converted_and_converted_models_copied(how: Callable[[nn.Module], nn.Module]) -> None:
    model = attentive(HOSTS[:4]).eval()
    expected = model(IMAGES)
    first = nn.SyncBatchNorm.convert_sync_batchnorm(how(model))
    second = how(nn.SyncBatchNorm.convert_sync_batchnorm(model))
    for converted in first, second:
        assert torch.equal(converted(IMAGES), expected)
        nn.init.zeros_(converted.bn.inserted_attention.gamma)  # its own
        assert not torch.allclose(converted(IMAGES), expected, atol=1e-3)
    assert torch.equal(model(IMAGES), expected)
    loaded = attentive(HOSTS[:4])
    loaded.load_state_dict(nn.SyncBatchNorm.convert_sync_batchnorm(model).state_dict())
    assert torch.equal(loaded.eval()(IMAGES), expected)


def test_a_converted_module_attends_once_however_often_it_is_converted() -> None:
    model = attentive("bn").eval()
    expected = model(IMAGES)
    for _ in range(3):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.bn.add_module("inserted_attention", model.bn.inserted_attention)
    assert torch.equal(model(IMAGES), expected)
    assert not remove_self_attention(model).bn._forward_hooks


def test_a_module_with_two_parents_is_converted_in_both() -> None:
    model = attentive([]).eval()
    model.again = nn.Sequential(nn.Conv2d(8, 8, 1), model.bn)
    wake(insert_self_attention(model, "bn", example_input=IMAGES))
    expected, again = model(IMAGES), model.again(torch.ones(2, 8, 3, 3).triu())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert torch.equal(converted(IMAGES), expected)
    assert torch.equal(converted.again(torch.ones(2, 8, 3, 3).triu()), again)


@quantization_is_deprecated
@pytest.mark.parametrize("after", HOSTS)
def test_quantization_keeps_the_layer_or_is_an_error(after: str) -> None:
    """It creates a new convolution without the children of the old one."""
    model = attentive(after).train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    prepared = torch.ao.quantization.prepare_qat(model)
    if after == "conv":
        with pytest.raises(RuntimeError, match=r"^Conv2d has lost the attention that was inserted after it"):
            prepared(IMAGES)
        assert remove_self_attention(prepared)(IMAGES).shape == (2, 8, 7, 7)
    else:
        with record_attention(prepared) as records:
            prepared(IMAGES)
        assert {path: len(calls) for path, calls in records.items()} == {f"{after}.inserted_attention": 1}


@pytest.mark.parametrize("after", HOSTS)
def test_a_replacement_without_the_layer_is_an_error_in_the_next_pass(after: str) -> None:
    model = attentive(after).eval()
    expected = model(IMAGES)
    path, _, name = after.rpartition(".")
    parent = model.get_submodule(path)
    host, kind = parent._modules[name], type(parent._modules[name]).__name__
    setattr(parent, name, copy.deepcopy(host))  # with a layer of its own
    assert torch.equal(model(IMAGES), expected)
    setattr(parent, name, nn.Sequential(host))  # wrapped
    assert torch.equal(model(IMAGES), expected)
    setattr(parent, name, nn.Identity())
    message = rf"^'{name}' of \w+: Identity, which has taken the place of a {kind}, has lost the attention"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            model(IMAGES)
    remove_self_attention(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("after", HOSTS)
def test_hosts_in_containers_that_are_not_called(after: str) -> None:
    """The modules of a list, or of a Sequential whose parts run one by one, are converted as well."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([nn.ModuleDict({"model": attentive(after)})])

        def forward(self, x: Tensor) -> Tensor:
            model = self.inner[0]["model"]
            for part in (model.conv, model.bn, model.act, *(model.block if after != "block" else [model.block])):
                x = part(x)
            return x

    model = Parts().eval()
    # Where attention was inserted by way of the whole model.
    remove_self_attention(model)
    wake(insert_self_attention(model, f"inner.0.model.{after}", example_input=IMAGES))
    expected = model(IMAGES)
    assert torch.equal(nn.SyncBatchNorm.convert_sync_batchnorm(model)(IMAGES), expected)


def test_whatever_contains_a_layer_may_be_replaced() -> None:
    model = nn.Sequential(nn.Sequential(Quantized()), nn.ReLU())
    insert_self_attention(model, "0.0.bn", example_input=IMAGES)
    model[0] = nn.Identity()
    assert torch.equal(model(IMAGES), IMAGES.relu())


def test_a_layer_may_be_removed_from_a_part_of_the_model() -> None:
    model = attentive(["bn", "block.1"]).eval()
    both = model(IMAGES)
    remove_self_attention(model.block)
    one = model(IMAGES)
    remove_self_attention(model.bn)
    assert not torch.allclose(one, both, atol=1e-3)
    assert not torch.allclose(model(IMAGES), one, atol=1e-3)


def test_fusing_a_norm_with_its_convolution() -> None:
    """The fused convolution contains the norm, whose layer is lost with it; one after the activation stays."""
    model = attentive("bn").eval()
    model.conv, model.bn = nn.utils.fusion.fuse_conv_bn_eval(model.conv, model.bn), nn.Identity()
    with pytest.raises(RuntimeError, match="'bn' of Quantized: Identity, which has taken the place of a BatchNorm2d"):
        model(IMAGES)
    model = attentive("act").eval()
    expected = model(IMAGES)
    model.conv, model.bn = nn.utils.fusion.fuse_conv_bn_eval(model.conv, model.bn), nn.Identity()
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-4, atol=1e-5)  # float32, in another order


@quantization_is_deprecated
@pytest.mark.parametrize("after", ["bn", "act"])
def test_fusing_for_quantization_does_not_drop_the_layer(after: str) -> None:
    fused = torch.ao.quantization.fuse_modules(attentive(after).eval(), ["conv", "bn", "act"])
    with pytest.raises(RuntimeError, match="has lost the attention that was inserted after it"):
        fused(IMAGES)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_nothing_outside_the_model_changes() -> None:
    """Neither hooks of the process, nor what a module that knows nothing of attention answers to a mistake."""
    before = {name: len(value) for name, value in vars(module_hooks).items() if name.endswith("_hooks")}
    assert "_global_module_registration_hooks" in before
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    errors = []
    for _ in range(2):
        with pytest.raises(RuntimeError) as caught:
            scripted.head = nn.Linear(2, 2)
        errors.append(str(caught.value))
        attentive("bn")
    assert errors[0] == errors[1]
    assert before == {name: len(value) for name, value in vars(module_hooks).items() if name.endswith("_hooks")}


def test_a_model_that_another_process_unpickles_and_converts(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)))
    wake(insert_self_attention(model, ["1", "2"], example_input=IMAGES)).eval()
    torch.save(model, tmp_path / "model.pt")
    torch.save([IMAGES, model(IMAGES).detach()], tmp_path / "pass.pt")
    code = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
x, y = torch.load({str(tmp_path / "pass.pt")!r})
model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
torch.testing.assert_close(model(x), y)
model[1] = torch.nn.Identity()
model(x)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "RuntimeError: '1' of Sequential: Identity, which has taken the place of a BatchNorm2d," in done.stderr


# --- compilers and tracers -------------------------------------------------------------------------------------------


class AttentionLeaves(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return isinstance(module, SelfAttention2d) or super().is_leaf_module(module, path)


@pytest.mark.parametrize("tracer", [torch.fx.Tracer, AttentionLeaves])
def test_features_of_a_traced_model(tracer: type[torch.fx.Tracer]) -> None:
    """As torchvision's feature extractor makes them: trace, and return what the nodes below a path have computed."""
    model = attentive(["bn", "block"]).eval()
    features = []
    handle = model.block.inserted_attention.register_forward_hook(lambda *call: features.append(call[-1]))
    expected = model(IMAGES)
    handle.remove()
    graph = tracer().trace(model)
    traced = torch.fx.GraphModule(model, graph)
    # Traced into, the layer calls its three projections; by itself it makes one convolution of them: rounding differs.
    torch.testing.assert_close(traced(IMAGES), expected)
    leaves = [node.target for node in graph.nodes if node.op == "call_module"]
    assert ("block.inserted_attention" in leaves) == (tracer is AttentionLeaves)
    assert ("block.inserted_attention.query" in leaves) == (tracer is not AttentionLeaves)
    *_, last, output = graph.nodes
    output.args = ({"attended": last},)
    graph.eliminate_dead_code()
    extractor = torch.fx.GraphModule(model, graph)
    torch.testing.assert_close(extractor(IMAGES)["attended"], features[0])


@pytest.mark.exhaustive
@pytest.mark.slow  # the compiler takes seconds
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_it_compiles_in_one_graph_and_exports() -> None:
    x = torch.randn(2, 3, 32, 32)
    model = wake(insert_self_attention(unet(), ["model.0", "model.1", "model.2"], example_input=x)).eval()
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    with record_attention(compiled) as records:
        torch.testing.assert_close(compiled(x), expected)
    assert [len(calls) for calls in records.values()] == [1, 1, 1]


@pytest.mark.exhaustive  # a compiler
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of the compiler's own modules
def test_a_converted_model_compiles_in_one_graph_and_exports() -> None:
    model = attentive(["conv", "bn"]).eval()
    expected = model(IMAGES)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.compiler.reset()
    # One graph cannot contain the first pass, in which the new norm gets its hook.
    torch.testing.assert_close(torch.compile(copy.deepcopy(converted), backend="aot_eager")(IMAGES), expected)
    assert torch.equal(converted(IMAGES), expected)
    torch.testing.assert_close(torch.compile(converted, fullgraph=True, backend="aot_eager")(IMAGES), expected)
    torch.testing.assert_close(torch.export.export(converted, (IMAGES,)).module()(IMAGES), expected)
