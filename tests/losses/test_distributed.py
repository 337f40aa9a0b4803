"""Two processes on gloo: the gradients of a wrapped loss module are those of one process."""

import datetime
import os
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1  # noqa: N814
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import hosm_losses as hosm
from tests.cases import MODULES, VP, assert_same, given
from tests.versions import OLD, SHARDS_ON_CPU

pytestmark = pytest.mark.slow

CASES = [(1, {}), (2, {}), (3, {}), (3, {"engine": "reverse"}), (3, {"probes": hosm.Paired()})]
CASES += [(3, {"targets": hosm.TargetScores(torch.neg, 2.0)}), (3, {"antithetic": True})]
COMPILES = CASES[:3]  # losses that become one graph
BATCH = 4


class Network(nn.Module):
    """Tokens through layer norm, attention and a checkpointed layer."""

    def __init__(self, checkpoint=False):
        super().__init__()
        self.inner, self.norm, self.qkv = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 12)
        self.block = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.SiLU())
        self.outer = nn.Linear(4, 3)
        self.checkpoint = checkpoint

    def forward(self, x, t):
        hidden = self.inner(x) + t[:, None, None]
        q, k, v = self.qkv(self.norm(hidden)).unsqueeze(1).chunk(3, -1)
        hidden = hidden + F.scaled_dot_product_attention(q, k, v).squeeze(1)
        block = hosm.checkpoint(self.block, hidden) if self.checkpoint else self.block(hidden)
        return self.outer(hidden + block)


def setting(order, options, checkpoint=False):
    """A loss module with its inputs, the same in every process."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    network = Network(checkpoint)
    module = MODULES[order](hosm.ScoreModel(network, VP), **options)
    probes = 2 if "probes" in options else 1
    return network, module, *given((BATCH, 5, 3), 1 if order == 1 else 2, probes)


def single(order, options):
    network, module, x0, inputs = setting(order, options)
    module(x0, **inputs).backward()
    return [parameter.grad for parameter in network.parameters()]


def rows(inputs, x0, chosen):
    """The inputs of some rows, of probes (K, B, *) as well."""
    return {
        name: value[:, chosen] if value.ndim > x0.ndim else value[chosen]
        for name, value in inputs.items()
    }


def own_half():
    return slice(dist.get_rank() * 2, dist.get_rank() * 2 + 2)


def ddp(case, static_graph=False):
    network, module, x0, inputs = setting(*case, checkpoint=True)
    wrapped, half = DistributedDataParallel(module, static_graph=static_graph), own_half()
    # Twice: a static graph is learnt in the first step and used in the second.
    for _ in range(2):
        network.zero_grad()
        wrapped(x0[half], **rows(inputs, x0, half)).backward()
    return [parameter.grad for parameter in network.parameters()]


def accumulated(case):
    """Sample by sample, as on the page on training: gradients are exchanged in the last part."""
    network, module, x0, inputs = setting(*case)
    wrapped, half = DistributedDataParallel(module), own_half()
    first, last = (slice(place, place + 1) for place in (half.start, half.start + 1))
    with wrapped.no_sync():
        (wrapped(x0[first], **rows(inputs, x0, first)) / 2).backward()
    (wrapped(x0[last], **rows(inputs, x0, last)) / 2).backward()
    return [parameter.grad for parameter in network.parameters()]


def fsdp(case):
    network, module, x0, inputs = setting(*case)
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    module(x0[own_half()], **rows(inputs, x0, own_half())).backward()
    return [parameter.grad.full_tensor() for parameter in network.parameters()]


def fully_sharded(module):
    return FSDP1(module, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp1(case):
    network, module, x0, inputs = setting(*case)
    wrapped = fully_sharded(module)
    wrapped(x0[own_half()], **rows(inputs, x0, own_half())).backward()
    with FSDP1.summon_full_params(wrapped, with_grads=True):
        return [parameter.grad.clone() for parameter in network.parameters()]


def evaluations(model, x0):
    """Numbers of everything that evaluates a model."""
    options = {"solver": hosm.FixedGrid(8), "divergence": "exact"}
    bound = hosm.variational_nll(model, x0, samples=4, generator=torch.Generator().manual_seed(0))
    hosm.check_derivatives(model, x0, order=2)
    latent, x = hosm.ode_nll(model, x0, **options).latent, hosm.ode_sample(model, x0, **options).x
    return torch.cat([bound.nll, latent.flatten(), x.flatten()])


def inside():
    """Evaluations in training of the model inside a wrapped module, whole again for FSDP."""
    _, module, x0, _ = setting(3, {})
    expected = evaluations(module.model, x0)
    wrapped = DistributedDataParallel(module)
    wrapped(x0).backward()
    found = [evaluations(wrapped.module.model, x0)]
    _, module, x0, _ = setting(3, {})
    wrapped = fully_sharded(module)
    wrapped(x0).backward()
    with FSDP1.summon_full_params(wrapped):
        found.append(evaluations(module.model, x0))
    if SHARDS_ON_CPU:
        _, module, x0, _ = setting(3, {})
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
        for _ in range(2):
            for call in (hosm.ode_nll, hosm.ode_sample, hosm.variational_nll):
                with pytest.raises(RuntimeError, match=r"unshard\(\)"):
                    call(module.model, x0)
            with pytest.raises((TypeError, RuntimeError), match=r"unshard\(\)"):
                hosm.check_derivatives(module.model, x0)
            module.unshard()
            found.append(evaluations(module.model, x0))
            module.reshard()
            module(x0).backward()
    return [expected, *found]


def learnt():
    """The m of each process after it learnt from data of its own, and after the next step."""
    _, module, x0, _ = setting(1, {"time_sampler": hosm.AdaptiveTimes()})
    wrapped, times = DistributedDataParallel(module), module.time_sampler
    times.learn(wrapped, x0 + dist.get_rank())
    found = [times.m.clone()]
    wrapped(x0).backward()
    found.append(times.m.clone())
    both = [torch.empty(2, *found[0].shape, dtype=times.m.dtype) for _ in range(2)]
    dist.all_gather(both, torch.stack(found))
    return torch.stack(both)


WORK = {"ddp": ddp, "static": partial(ddp, static_graph=True), "accumulated": accumulated}
WORK["fsdp1"] = fsdp1
WORK |= {"fsdp": fsdp} if SHARDS_ON_CPU else {}


def work(rank, folder):
    warnings.simplefilter("ignore")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    found = {name: [WORK[name](case) for case in CASES] for name in WORK}
    found |= {"inside": inside(), "learnt": learnt()}
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()
    # At the exit of an interpreter a thread of gloo sometimes aborts the process.
    os._exit(0)


def test_two_processes_compute_what_one_does(tmp_path):
    """Gradients, what evaluates a model inside a wrapped module, and times that one learnt."""
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / "found.pt")
    expected = [single(*case) for case in CASES]
    for kind in WORK:
        for case, gradients, right in zip(CASES, found[kind], expected, strict=True):
            print(kind, case)  # noqa: T201
            assert_same(gradients, right, 1e-8)
    own, *others = found["inside"]
    assert own.isfinite().all()
    for numbers in others:
        torch.testing.assert_close(numbers, own)
    (own, after), (other, also_after) = found["learnt"]
    assert not torch.equal(own, other)
    assert torch.equal(after, own)
    assert torch.equal(also_after, own)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(module):
    return fully_shard(module, mesh=init_device_mesh("cpu", (1,)))


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # at order one it works
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize(
    "wrap",
    [
        DistributedDataParallel,
        fully_sharded,
        shard,
        lambda network: shard(network.block) and network,
    ],
)
def test_what_is_wrapped_below_the_loss_is_refused_above_order_one(wrap):
    """Also where a module was built before it was sharded."""
    network, x0 = Network(), torch.randn(2, 5, 3)
    module = hosm.ThirdOrderDSM(hosm.ScoreModel(network, VP))
    wrapped = wrap(network)
    model = hosm.ScoreModel(wrapped, VP)
    calls = [partial(hosm.third_order_dsm, model, x0), partial(hosm.ThirdOrderDSM, model)]
    if wrapped is network:
        calls.append(partial(module, x0))
    if SHARDS_ON_CPU or wrapped is not network:
        hosm.first_order_dsm(model, x0).backward()
    for call in calls:
        with pytest.raises(TypeError, match="Wrap the loss module"):
            call()


def alone(module):
    return module


# The tests of two processes have DDP with a checkpoint.
TOGETHER = [(alone, "checkpoint autocast"), (alone, "compile autocast"), (shard, "checkpoint")]
TOGETHER += [(w, o) for w in (DistributedDataParallel, shard) for o in ("autocast", "compile")]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("wrap", "options"), TOGETHER)
def test_the_matrix_of_the_page_on_large_networks(wrap, options):
    """What is put around a loss, and into its network, leaves the gradient as it is."""
    if (wrap is shard and not SHARDS_ON_CPU) or (OLD and "compile" in options):
        pytest.skip("not with this PyTorch")
    autocast = torch.autocast("cpu", torch.bfloat16, enabled="autocast" in options)
    for case in COMPILES if "compile" in options else CASES:
        found = []
        for changed in (False, True):
            network, module, x0, inputs = setting(*case, changed and "checkpoint" in options)
            if "autocast" in options:
                module, x0 = module.float(), x0.float()
                inputs = {name: value.float() for name, value in inputs.items()}
            call = wrap(module) if changed else module
            if changed and "compile" in options:
                torch._dynamo.reset()
                call = torch.compile(call, backend="eager")
            with autocast:
                loss = call(x0, **inputs)
            loss.backward()
            gradients = [p.grad for p in network.parameters() if p.grad is not None]
            found.append([g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients])
        print(case)  # noqa: T201
        assert_same(*found, 0.02 if "autocast" in options else 1e-8)
