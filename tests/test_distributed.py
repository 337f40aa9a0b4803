"""Two processes on gloo: the gradients of a wrapped loss module are those of one process."""

import datetime
import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import hosm_losses as hosm
from tests.versions import shards_on_cpu

MODULES = {1: hosm.FirstOrderDSM, 2: hosm.SecondOrderDSM, 3: hosm.ThirdOrderDSM}
KINDS = ("auto", "taylor", "reverse")
PAIRED = ("paired", "paired in taylor")
CASES = [(1, "auto"), *[(order, kind) for order in (2, 3) for kind in KINDS + PAIRED]]
CASES.append((2, "stein"))
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


def setting(order, engine, checkpoint=False):
    """A loss module with its inputs, the same in every process."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    network = Network(checkpoint)
    options = {
        "paired": {"estimator": "paired"},
        "paired in taylor": {"estimator": "paired", "derivative": "taylor"},
        "stein": {},
    }.get(engine, {"derivative": engine})
    options = {} if order == 1 else options
    kind = hosm.SteinDSM if engine == "stein" else MODULES[order]
    module = kind(hosm.ScoreModel(network, hosm.VPSchedule()), **options)
    x0 = torch.randn(BATCH, 5, 3)
    inputs = {"t": torch.linspace(0.2, 0.8, BATCH), "noise": torch.randn_like(x0)}
    if order > 1:
        two = engine in (*PAIRED, "stein")
        inputs["probe"] = torch.randn(2, *x0.shape) if two else torch.randn_like(x0)
    return network, module, x0, inputs


def single(order, engine):
    network, module, x0, inputs = setting(order, engine)
    module(x0, **inputs).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def rows(inputs, x0, chosen):
    """The inputs of some rows, of probes (K, B, *) as well."""
    return {
        name: value[:, chosen] if value.ndim > x0.ndim else value[chosen]
        for name, value in inputs.items()
    }


def ddp(order, engine, **options):
    network, module, x0, inputs = setting(order, engine, checkpoint=True)
    wrapped = DistributedDataParallel(module, **options)
    half = slice(dist.get_rank() * 2, dist.get_rank() * 2 + 2)
    # Twice: a static graph is learnt in the first step and used in the second.
    for _ in range(2):
        network.zero_grad()
        wrapped(x0[half], **rows(inputs, x0, half)).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def fsdp(order, engine):
    from torch.distributed.fsdp import fully_shard

    network, module, x0, inputs = setting(order, engine)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(module, mesh=mesh)
    half = slice(dist.get_rank() * 2, dist.get_rank() * 2 + 2)
    module(x0[half], **rows(inputs, x0, half)).backward()
    return {name: p.grad.full_tensor() for name, p in network.named_parameters()}


def likelihood():
    """The steps that a rank of an easy batch and one of a hard batch take, alone and together."""
    rate = (1.0, 6.0)[dist.get_rank()]

    def network(x, t):
        if together:  # all ranks have to call it as often, as where it gathers its parameters
            dist.all_reduce(torch.ones(1))
        return rate * x.tanh()

    together, model = False, hosm.ScoreModel(network, hosm.VPSchedule())
    x = torch.ones(2, 3, dtype=torch.float64)
    options = {"steps": None, "tolerance": 0.05}
    alone = hosm.ode_nll(model, x, **options).steps
    together = True
    agreed = hosm.ode_nll(model, x, group=dist.group.WORLD, **options)
    drawn = hosm.ode_sample(model, x, divergence=None, group=dist.group.WORLD, **options)
    found = torch.tensor([alone, agreed.steps, int(agreed.nfe[0]), int(drawn.nfe[0])])
    everything = [torch.zeros_like(found) for _ in range(2)]
    dist.all_gather(everything, found)
    return torch.stack(everything)


def work(rank, folder, kind, options):
    warnings.simplefilter("ignore")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    if kind == "likelihood":
        found = likelihood()
    else:
        found = {case: {"ddp": ddp, "fsdp": fsdp}[kind](*case, **options) for case in CASES}
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()
    # At the exit of an interpreter a thread of gloo sometimes aborts the process.
    os._exit(0)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ddp", {}),
        ("ddp", {"static_graph": True}),
        pytest.param("fsdp", {}, marks=shards_on_cpu),
    ],
)
def test_two_processes_give_the_gradient_of_one(tmp_path, kind, options):
    mp.spawn(work, (str(tmp_path), kind, options), nprocs=2)
    found = torch.load(tmp_path / "found.pt")
    for case in CASES:
        expected = single(*case)
        assert expected.keys() == found[case].keys()
        size = max(float(gradient.abs().max()) for gradient in expected.values())
        for name, gradient in expected.items():
            torch.testing.assert_close(found[case][name], gradient, rtol=0, atol=1e-9 * size)


def test_a_group_takes_the_steps_of_its_most_demanding_rank(tmp_path):
    mp.spawn(work, (str(tmp_path), "likelihood", {}), nprocs=2)
    (easy, *of_easy), (hard, *of_hard) = torch.load(tmp_path / "found.pt").tolist()
    assert easy < hard
    steps, evaluations, drawn = of_easy
    assert of_hard == of_easy
    assert (steps, evaluations) == (hard, hard + 10)
    assert drawn > 10


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_ddp_around_the_network_is_refused_above_order_one():
    model = hosm.ScoreModel(DistributedDataParallel(Network()), hosm.VPSchedule())
    hosm.first_order_dsm(model, torch.randn(2, 5, 3)).backward()
    with pytest.raises(TypeError, match=r"DistributedDataParallel.*Wrap the loss module"):
        hosm.third_order_dsm(model, torch.randn(2, 5, 3))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("part", ["", "block"])
def test_fsdp_on_the_network_or_a_part_of_it_is_refused_above_order_one(part):
    from torch.distributed.fsdp import fully_shard

    network = Network()
    fully_shard(network.get_submodule(part), mesh=init_device_mesh("cpu", (1,)))
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    message = r"FSDPModule.*Wrap the loss module.*fully_shard\(Third"
    with pytest.raises(TypeError, match=message):
        hosm.ThirdOrderDSM(model)
    with pytest.raises(TypeError, match=message):
        hosm.third_order_dsm(model, torch.randn(2, 5, 3))


@pytest.mark.usefixtures("one_process")
def test_what_is_sharded_after_construction_is_refused_by_the_call():
    from torch.distributed.fsdp import fully_shard

    network = Network()
    module = hosm.ThirdOrderDSM(hosm.ScoreModel(network, hosm.VPSchedule()))
    fully_shard(network, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(TypeError, match=r"FSDPModule.*Wrap the loss module"):
        module(torch.randn(2, 5, 3))
