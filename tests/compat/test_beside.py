"""What is done with a model beside training it: exported after the fit, transformed, differentiated twice."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import export
from torch.func import functional_call, grad, jvp, vmap

from lightning_lance import LanceConfig, LanceError, LanceSession, is_swapped
from tests.compat.networks import CLASSES, NETWORKS, Case
from tests.compat.rows import Task, data, lance, write
from tests.compat.setups import CASE, resnet
from tests.swapped import COMPACT_MODES
from tests.trainers import make_trainer

pytest.importorskip("torchvision")
pytest.importorskip("timm")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning"),
]


def fitted(case: Case) -> nn.Module:
    module = Task(case.build())
    make_trainer([lance()], max_epochs=1).fit(module, data(case))
    return module.net.eval()


def operators(program: Any) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vit_tiny_patch16_224", "nn.TransformerEncoder"])
def test_export_after_fit(name: str) -> None:
    """The graph is that of a network which was never swapped, and holds what an ExecuTorch backend takes."""
    case = CASE if name == "resnet18" else NETWORKS[name]
    net, x = fitted(case), case.input(2)
    twin = case.build().eval()
    program = export(net, (x,), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), net(x))
    assert operators(program) == operators(export(twin, (x,), strict=False))
    core = program.run_decompositions()
    found = {target for target in operators(core) if isinstance(target, torch._ops.OpOverload)}
    assert found
    assert not [target for target in found if target.namespace != "aten"]
    assert not [target for target in found if torch.Tag.core not in target.tags and "sym" not in str(target)]
    assert not [target for target in found if "backward" in str(target) or "dropout" in str(target)]
    with torch.no_grad():
        torch.testing.assert_close(core.module()(x), net(x), rtol=1e-4, atol=1e-4)
    write("other", "torch.export after fit", None, "the graph is that of the plain model, in core ATen operators")


def test_tracing_after_fit() -> None:
    net, x = fitted(CASE), CASE.input(2)
    with torch.no_grad():
        traced = torch.jit.trace(net, x)
        torch.testing.assert_close(traced(x), net(x))
    write("other", "TorchScript tracing after fit", None)


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 does not export a batch norm with a recent onnxscript")
def test_onnx_export_after_fit() -> None:
    from onnx.reference import ReferenceEvaluator

    net, x = fitted(CASE), CASE.input(2)
    program = torch.onnx.export(net, (x,), dynamo=True, verbose=False)
    assert program is not None
    (found,) = ReferenceEvaluator(program.model_proto).run(None, {program.model_proto.graph.input[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), net(x), rtol=1e-4, atol=1e-4)
    write("other", "ONNX export after fit", None)


# --- transforms and second derivatives: an error, never a wrong number ------------------------------------------------


@pytest.fixture
def ready() -> Any:
    """A calibrated network, batch norm in eval mode, in which every layer is projected."""
    net, x = resnet().eval(), CASE.input(8)
    session = LanceSession(net, LanceConfig(rank=COMPACT_MODES))
    session.start(observe=False)
    session.calibrate([lambda: net(x)])
    yield net, x, session
    session.stop()
    assert not is_swapped(net)


def loss_of(net: nn.Module, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda parameters: functional_call(net, parameters, (x,)).square().mean()


def test_function_transforms_are_refused_where_they_would_be_wrong(ready: Any) -> None:
    net, x, session = ready
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}
    loss = loss_of(net, x)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
    with pytest.raises(LanceError, match=r"torch\.func.*restore\(model\)"):
        grad(loss)(parameters)
    with pytest.raises(LanceError, match=r"torch\.func.*restore\(model\)"):
        vmap(grad(loss))(stacked)
    # Without a gradient there is nothing to compress.
    several, forward = vmap(loss)(stacked), jvp(loss, (parameters,), (parameters,))
    session.stop()
    torch.testing.assert_close(several, vmap(loss)(stacked))
    torch.testing.assert_close(forward, jvp(loss, (parameters,), (parameters,)))
    assert grad(loss)(parameters).keys() == parameters.keys()
    write(
        "other", "torch.func where layers project", None, "gradients are refused with an error, and work once restored"
    )


def test_function_transforms_before_calibration_run_the_stock_path() -> None:
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 6)
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}
    expected = grad(loss_of(net, x))(parameters)
    session = LanceSession(net, LanceConfig(rank=COMPACT_MODES))
    session.start(observe=False)
    torch.testing.assert_close(grad(loss_of(net, x))(parameters), expected)
    session.stop()


def test_second_derivatives_are_refused(ready: Any) -> None:
    net, x, _ = ready
    x = x.clone().requires_grad_()
    with pytest.raises(LanceError, match=r"create_graph=True.*restore\(model\)"):
        torch.autograd.grad(net(x).sum(), x, create_graph=True)
    write("other", "second derivatives (create_graph=True) where layers project", None, "refused with an error")


@pytest.mark.parametrize("bits", ["auto", 8, None])
def test_second_derivatives_in_a_step_that_projects_nothing(bits: Any) -> None:
    """The graph of the gradient is whole, and as exact as what is kept."""
    net = nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 1)
    )
    x = torch.randn(64, 32, requires_grad=True)
    session = LanceSession(net, LanceConfig(bits=bits))
    session.start()

    def penalised(step: Any) -> Tensor:
        torch.manual_seed(0)
        with step:
            (first,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
            loss = first.square().sum()
        return torch.cat([found.flatten() for found in torch.autograd.grad(loss, list(net.parameters())[:-1])])

    plain, ours = penalised(nullcontext()), penalised(session.step())
    session.stop()
    if bits is None:
        torch.testing.assert_close(ours, plain)
    else:
        assert 1e-5 < float((ours - plain).norm() / plain.norm()) < (0.02 if bits == 8 else 0.2)
    write("other", "second derivatives (create_graph=True)", None, "as exact as what is kept")


def test_a_gradient_penalty_is_refused_where_layers_project_and_the_model_restored() -> None:
    class Penalised(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0].requires_grad_()
            loss = F.cross_entropy(self(x).square(), batch[1])
            if torch.is_grad_enabled():
                (first,) = torch.autograd.grad(loss, x, create_graph=True)
                loss = loss + first.square().sum()
            return loss

    module = Penalised(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.Linear(16, CLASSES)))
    with pytest.raises(LanceError, match=r"create_graph=True.*restore\(model\)"):
        make_trainer([lance(rank=COMPACT_MODES, calibration_batches=1)]).fit(module, data(CASE))
    assert not is_swapped(module)
    make_trainer([lance()]).fit(module, data(CASE))


ACCELERATORS = [
    name for name in ("cuda", "mps", "xpu") if getattr(torch, name, None) and getattr(torch, name).is_available()
]


@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_each_accelerator_that_is_present(accelerator: str) -> None:
    """Two epochs on the device, in the precisions that it has."""
    from tests.compat.rows import check_row

    kind = "gpu" if accelerator in ("cuda", "xpu") else accelerator
    for precision in ("32-true", "16-mixed"):
        report = check_row(Task(resnet()), data(CASE), accelerator=kind, precision=precision)
        write("setup", f"{accelerator}, precision {precision}", report)
