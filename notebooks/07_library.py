# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: -all
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The library in five minutes
# A network and images of your own, three lines to a first adapted prediction. The network here has
# random weights and the images are noise, so that the notebook needs no data: the numbers say
# nothing, the calls are those of [the page](../docs/library.md).

# %%
import tempfile
from copy import deepcopy
from pathlib import Path

import timm
import torch
import torchvision
from torch.utils.data import TensorDataset

torch.manual_seed(0)
net = torchvision.models.resnet18(num_classes=10)
images = torch.rand(8, 3, 32, 32)

# %% [markdown]
# ## Adapt
# The scores are [B, C]; the network has learned from the batch when they come back.

# %%
import driftline

method = driftline.make("tent", deepcopy(net))
scores = method.adapt(images)
scores.shape

# %% [markdown]
# Another strategy is another name.

# %%
for name in ("tent", "cotta", "lame"):
    method = driftline.make(name, deepcopy(net))
    for _ in range(2):
        scores = method.adapt(images)
    print(name, scores.argmax(1).tolist())

# %% [markdown]
# ## Save, load, export
# A loaded method answers bit by bit as the saved one, and goes on learning as that would.

# %%
method = driftline.make("tent", deepcopy(net))
method.adapt(images)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "adapted.safetensors")
    driftline.save(method, path)
    print(f"{path.stat().st_size / 1024:.0f} KB")
    loaded = driftline.load(path, deepcopy(net))
assert torch.equal(loaded.adapt(images), method.adapt(images))

# %% [markdown]
# The plain network that answers as the method does, without this library:

# %%
plain = deepcopy(net).eval()
plain.load_state_dict(driftline.export(method, images))
assert torch.allclose(plain(images), method.predict(images), atol=1e-4)

# %% [markdown]
# ## Learn tasks
# Two tasks of two classes each, EASE, and the accuracy on the tasks so far.


# %%
def noise(first: int) -> TensorDataset:
    return TensorDataset(torch.rand(8, 3, 32, 32), torch.arange(first, first + 2).repeat(4))


tasks = driftline.tasks([(noise(0), noise(0)), (noise(2), noise(2))], batch_size=4)
vit = timm.create_model("test_vit", num_classes=0, img_size=32)
method = driftline.make("ease", vit, num_classes=4, epochs=1, rank=4)
for task in tasks:
    driftline.learn(method, task)
    for earlier in tasks[: task.index + 1]:
        batches = list(earlier.test())
        right = sum(int((method.predict(b.x).argmax(1) == b.y).sum()) for b in batches)
        print(f"after task {task.index}, on task {earlier.index}: {right} of 8 right")
