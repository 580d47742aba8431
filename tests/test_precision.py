"""`precision=bf16`: passes without gradients compute in another type, and nothing else does."""

from __future__ import annotations

from copy import deepcopy
from itertools import islice

import pytest
import test_contract as contract
import timm
import torch

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.runs import machine
from driftline.runs.compose import arithmetic, complete

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of tiny tasks


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=10)
    return Backbone(net, mean=[0.5] * 3, std=[0.5] * 3, input_size=32).eval()


@pytest.mark.parametrize("answer", ["logits", "features"])
def test_a_pass_is_rounded_where_it_records_no_gradients(backbone, answer):
    x = torch.rand(4, 3, 32, 32)
    low = deepcopy(backbone)
    low.low = torch.bfloat16
    low = deepcopy(low)  # as teachers and anchors are made
    exact, other = getattr(backbone, answer), getattr(low, answer)
    assert torch.equal(other(x), exact(x)) and other(x).requires_grad
    with torch.no_grad():
        rounded, whole = other(x), exact(x)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, whole)
    assert (rounded - whole).abs().max() < 0.05 * whole.abs().max()


def test_the_features_of_any_network_are_float32_again():
    """Of one without timm's methods they are read by a hook, inside the pass."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.Linear(8, 5))
    wrapped = Backbone(net)
    wrapped.low = torch.bfloat16
    with torch.no_grad():
        assert wrapped.features(torch.rand(2, 3, 2, 2)).dtype == torch.float32


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", contract.OF_FILES, ids=lambda case: case.name)
def test_every_method_takes_it_and_learns_in_float32(case, monkeypatch):
    plain = contract.network

    def low(kind, **options):
        made = plain(kind, **options)
        made.low = torch.bfloat16
        return made

    monkeypatch.setattr(contract, "network", low)
    method = contract.make(case)
    for _, result in islice(contract.drive(method, case), 1):
        of_batch = {"scores": result} if isinstance(result, torch.Tensor) else result
        types = {key: torch.as_tensor(value).dtype for key, value in of_batch.items()}
        assert torch.bfloat16 not in types.values(), types
    if case.adapts:
        assert method.predict(contract.images(case, 2)[0]).dtype == torch.float32
    tensors = {k: v for k, v in method.state_dict().items() if isinstance(v, torch.Tensor)}
    assert [name for name, value in tensors.items() if value.dtype == torch.bfloat16] == []


def test_half_precision_needs_a_gpu(configure):
    with pytest.raises(UserError, match="precision=fp16 needs a GPU; on a CPU use precision=bf16"):
        machine.set_up(configure("precision=fp16", "runtime.device=cpu"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], []),
        (["precision=bf16"], ["bf16"]),
        (["precision=tf32", "channels_last=true"], ["tf32", "channels_last"]),
        (["backbone=efficientnet_lite0_in1k"], ["channels_last"]),
        (["backbone=efficientnet_lite0_in1k", "channels_last=false"], []),
        (["backbone=timm", "backbone.tag=mobilenetv3_large_100.ra_in1k"], ["channels_last"]),
        (["backbone=timm", "backbone.tag=vit_tiny_patch16_224.augreg_in21k_ft_in1k"], []),
        (["backbone=resnet50_in1k"], []),
    ],
)
def test_what_rounds_otherwise_is_named(configure, words, said):
    """In the line of the run, and in the key of what was prepared on source images."""
    assert arithmetic(complete(configure(*words))) == said
