"""A model whose parts are on different processes: cut by torch's fully_shard, experts shared out, or both.

Every weight is cut by rows over the mesh dimension that shards it (one process where nothing does) and replicated over
the other (FSDP2, https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html; ZeRO-3, arXiv 1910.02054; on
one process a shard, it is what DDP does). A block's weights are gathered before it is computed and let go after, in
BF16 where they are read in nothing else (narrow_gather.py).
Gradients are summed, not averaged: of an expert over the processes that hold it, since tokens of the others have
travelled to it, of all else over everyone. After every micro-batch they are reduced to the process's own part, over the
replicas after the last one alone.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe_train.cost.layout import Layout
from moe_train.model.experts import Experts
from moe_train.model.transformer import Losses, Transformer
from moe_train.parallel.expert_exchange import share_out_experts
from moe_train.parallel.meshes import Meshes
from moe_train.parallel.narrow_gather import NarrowGather
from moe_train.parallel.spread import Clipping, Part, clip_coefficient, shares_copies
from moe_train.parallel.whole_matrices import Copies, WholeMatrices


class _Held(NamedTuple):
    """A parameter of the model, and what this process holds of it."""

    sharded: nn.Parameter  # fully_shard's, with rows of this process's experts or of the whole weight
    local: nn.Parameter  # its memory, as a plain tensor
    part: Part
    copies: int  # processes that hold the same
    of_experts: bool


class Sharded:
    """Needs all processes: building, gradients, and every call of `wrapped`.

    `model` may be on torch's meta device: what a process holds of it is then left for somebody to fill.
    """

    loss_scale = 1.0

    def __init__(
        self,
        model: Transformer,
        layout: Layout,
        meshes: Meshes,
        accelerator: Accelerator,
        *,
        fp8_dispatch: bool,
        gathers_bf16: bool,
    ) -> None:
        # An expert's output is one, and nothing adds to it in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self._accelerator, self._meshes = accelerator, meshes
        whole = {name: parameter.shape for name, parameter in model.named_parameters()}
        if layout.expert_parallel > 1:
            share_out_experts(model, meshes.experts.get_group("expert"), fp8_dispatch)
        self._modules, gathers = _cut(model, meshes, gathers_bf16)
        self._model = model
        if any(parameter.is_meta for parameter in model.parameters()):
            model.to_empty(device=accelerator.device)
            for buffer in model.buffers():  # biases of routers, which begin at zero
                buffer.zero_()
        expert_weights = {id(p) for m in model.modules() if isinstance(m, Experts) for p in m.parameters()}
        # By name: between a forward pass and what follows it the model has gathered weights in their place.
        self._held = {
            name: _hold(p, whole[name], meshes, id(p) in expert_weights) for name, p in model.named_parameters()
        }
        for gather in gathers:
            gather.held = [self._held[name].local for name in gather.names]
        cut = [held for held in self._held.values() if not held.of_experts and held.local.ndim == 2]
        self.whole_matrices = None
        if layout.shard > 1:
            self.whole_matrices = WholeMatrices(
                meshes.rest.get_group("shard"), {held.local: held.part.shape for held in cut}
            )

        self.copies = None
        if shares_copies(accelerator.device):
            cut_here = () if self.whole_matrices is None else self.whole_matrices.shapes
            same: dict[Tensor, dist.ProcessGroup] = {
                held.local: (meshes.experts if held.of_experts else meshes.rest).get_group("replicate")
                for held in self._held.values()
                if held.local not in cut_here
            }
            self.copies = Copies(same)

    def local(self, name: str) -> nn.Parameter:
        return self._held[name].local

    def part(self, name: str) -> Part:
        return self._held[name].part

    def as_saved(self, name: str, local: Tensor) -> Tensor:
        held = self._held[name]
        mesh, placements = self._meshes.rest, [Replicate(), Shard(0)]
        if held.of_experts:
            mesh, placements = self._meshes.experts, [Replicate(), Shard(0), Shard(0)]
        shape = held.part.shape
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)

    def wrapped(self, *inputs: object) -> Losses:
        with self._accelerator.autocast():
            losses: Losses = self._model(*inputs)
        return losses

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        for module in self._modules:
            module.set_requires_all_reduce(last, recurse=False)
        yield
        if last:
            for held in self._held.values():
                if held.local.data_ptr() != _memory_of(held.sharded.data).data_ptr():
                    raise RuntimeError("fully_shard has moved a weight away from what the optimizers hold")
                if held.sharded.grad is not None:
                    held.local.grad = _memory_of(held.sharded.grad)

    def clip(self, max_norm: float, *, multiply: bool) -> Clipping:
        held = [each for each in self._held.values() if each.local.grad is not None]
        gradients = [each.local.grad for each in held if each.local.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        copies = torch.tensor([each.copies for each in held], dtype=torch.float64).to(norms.device)
        square = (norms.double().square() / copies).sum()
        dist.all_reduce(square)
        norm = square.sqrt().to(norms.dtype)
        coefficient = clip_coefficient(norm, max_norm)
        if not multiply:
            return Clipping(norm, coefficient)
        torch._foreach_mul_(gradients, coefficient)
        return Clipping(norm, None)

    def release_gradients(self) -> None:
        for held in self._held.values():
            held.sharded.grad = None


def _cut(model: Transformer, meshes: Meshes, gathers_bf16: bool) -> tuple[list[FSDPModule], list[NarrowGather]]:
    """Give every weight to fully_shard, experts over their own mesh; the innermost modules first.

    Returns them, and what gathers in BF16, where that is wanted.
    """
    experts = meshes.experts["replicate", "expert_shard"]
    over: list[tuple[nn.Module, DeviceMesh]] = [(m, experts) for m in model.modules() if isinstance(m, Experts)]
    over += [(block, meshes.rest) for block in [*model.blocks, *model.mtp]]
    modules: list[FSDPModule] = []
    gathers: list[NarrowGather] = []
    for module, mesh in [*over, (model, meshes.rest)]:
        gather = NarrowGather.of_group(module, model, mesh.size(1)) if gathers_bf16 else None
        cut = fully_shard(module, mesh=mesh)
        assert isinstance(cut, FSDPModule)
        cut.set_force_sum_reduction_for_comms(True)
        cut.set_gradient_divide_factor(1.0)
        if gather is not None:
            cut.set_custom_all_gather(gather)
            gathers.append(gather)
        modules.append(cut)
    return modules, gathers


def _hold(parameter: nn.Parameter, whole: torch.Size, meshes: Meshes, of_experts: bool) -> _Held:
    data = parameter.data
    if not isinstance(data, DTensor):
        raise RuntimeError(f"a weight of {tuple(whole)} was left whole by fully_shard")
    local = _memory_of(data)
    first, end = 0, whole[0]
    mesh = meshes.experts if of_experts else meshes.rest
    for dimension in mesh.mesh_dim_names[1:] if mesh.mesh_dim_names else ():
        rows = -(-(end - first) // mesh[dimension].size())  # as torch's chunk
        first = min(end, first + rows * mesh.get_local_rank(dimension))
        end = min(end, first + rows)
    if len(local) != end - first:
        raise RuntimeError(f"a process holds {len(local)} of the {end - first} rows it should of {tuple(whole)}")
    copies = mesh["replicate"].size()
    return _Held(parameter, nn.Parameter(local), Part(whole, first, end), copies, of_experts)


def _memory_of(tensor: Tensor) -> Tensor:
    """What this process has of a DTensor, sharing its memory."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()
