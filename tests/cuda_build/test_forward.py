"""Forward passes as a GPU would run them, on fake CUDA tensors: with kernels of half precision, without a wait or a copy.

Fake tensors have a device and a shape, and no storage, so that no device is needed; `make test-cuda-build` runs this with a build
of torch for CUDA. The backward pass cannot be run like that: autograd asks the driver for its device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from m4train.batch import PackedBatch
from m4train.config import AdapterConfig
from m4train.models import sampling
from m4train.models.contexts import KeyValueCache
from m4train.models.generation_settings import GenerationSettings
from m4train.models.sampling import choose, constrain, kept
from m4train.models.stopping import Stopping
from m4train.training.adapters import apply_adapters
from tests.gpu.test_models import model_and_batch
from tests.helpers.synchronisation import Synchronisations
from tests.unit.models.test_packing import FAMILIES
from tests.unit.training.test_step_counts import VIEWS

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="needs a build of torch for CUDA")

# Calls of the kernel for segments of any length in a forward pass of these models: one a layer of any kind.
LAYERS = {"idefics": 10, "idefics2": 7, "idefics3": 5}


# Operations of a forward pass of training that are not just another look at memory, found with torch 2.13: lower them if a
# change needs fewer.
LAUNCHES = {"idefics": 383, "idefics2": 262, "idefics3": 184}


@pytest.fixture(autouse=True)
def kept_ids_are_no_fakes() -> Iterator[None]:
    sampling._on.cache_clear()
    yield
    sampling._on.cache_clear()


@contextmanager
def on_fake_cuda(family: str, change: Callable[[Any], Any] = lambda model: None) -> Iterator[tuple[Any, PackedBatch]]:
    """A model and a batch of that family as fake CUDA tensors, under autocast to bf16."""
    model, batch = model_and_batch(family)
    change(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.MonkeyPatch.context() as patch:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    fake = mode.from_tensor(parameter.data).to("cuda")
                    module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        model.tie_weights()
        # Without a device autocast would be off.
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        with torch.autocast("cuda", torch.bfloat16):
            yield model, batch.to("cuda")


def watched(run: Callable[[], Any]) -> Synchronisations:
    """What the second of two runs did, in which nothing may wait or copy: the first makes the tables that are kept."""
    run()
    with Synchronisations() as seen:
        run()
    assert not seen.found, "\n".join(seen.found)
    return seen


def kernels(seen: Synchronisations) -> int:
    assert not [name for name in seen.calls if "scaled_dot_product" in name or "softmax" in name]
    return sum("varlen" in name for name in seen.calls)


def launches(seen: Synchronisations) -> int:
    names = [name.split(".")[1].strip("_") for name in seen.calls]
    return sum(not name.startswith(tuple(f"{view}_" for view in VIEWS)) and name not in VIEWS for name in names)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pictures", ["some", "none", "no part"])
def test_a_training_pass(family: str, pictures: str) -> None:
    with on_fake_cuda(family) as (model, batch):
        if pictures == "no part":
            batch = replace(batch, images=None, image_positions=None, cross=None)
        elif pictures == "none":  # one image that nobody uses
            batch = replace(batch, images=replace(batch.images, count=0), image_positions=None, cross=None)
        seen = watched(lambda: model.train()(batch, z_loss=0.01).loss)
    layers = LAYERS[family] if pictures == "some" else 1
    assert kernels(seen) >= layers
    if pictures == "some":
        assert launches(seen) <= 1.02 * LAUNCHES[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_evaluation_pass(family: str) -> None:
    with on_fake_cuda(family) as (model, batch), torch.no_grad():
        seen = watched(lambda: model.eval()(batch).token_losses)
    assert kernels(seen) == LAYERS[family]


def adapted_head(model: Any) -> None:
    targets = {"lm_head": ["lm_head"], "text": ["q_proj", "down_proj"], "vision": ["q_proj"]}
    apply_adapters(model, AdapterConfig(kind="lora", rank=4, targets=targets))


LOSSES: list[Any] = [("chunked", None), ("chunked", adapted_head), ("auto", None)]
if hasattr(nn, "LinearCrossEntropyOptions"):
    LOSSES.append(("torch", None))


@pytest.mark.parametrize(("kind", "change"), LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_every_loss(kind: str, change: Any, weighted: bool) -> None:
    """Liger's is left out: it waits for the device to count targets, and its kernels take no fake tensors."""
    with on_fake_cuda("idefics3", change or (lambda model: None)) as (model, batch):
        model.loss_kind = kind
        if weighted:
            batch = replace(batch, target_weights=torch.ones_like(batch.targets, dtype=torch.float32))
        z_loss = 0.0 if kind == "torch" else 0.01
        watched(lambda: model.train()(batch, z_loss=z_loss).loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_generated_token(family: str) -> None:
    """From the last tokens of three rows to the next ones, with all that may be asked of them."""
    settings = GenerationSettings(
        max_new_tokens=40,
        min_new_tokens=40,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        min_p=0.01,
        eos_token_id=[2, 5],
        bad_words_ids=[[7], [3, 4]],
        repetition_penalty=1.2,
        no_repeat_ngram_size=3,
        suppress_tokens=[9],
    )
    assert settings.ends == [2, 5]  # read once, here
    with on_fake_cuda(family) as (model, _), torch.no_grad():
        config, rows, past = model.config, 3, 11
        text = config.text_config
        filled = lambda: KeyValueCache.of(
            [
                (torch.zeros(rows, text.num_key_value_heads, past, text.head_dim, device="cuda", dtype=torch.bfloat16),)
                * 2
            ]
            * text.num_hidden_layers
        )
        prompts = torch.zeros(rows, past, dtype=torch.int64, device="cuda")
        stopping, real = Stopping(settings, prompts.device), torch.ones_like(prompts, dtype=torch.bool)
        caches = [filled(), filled()]

        def token() -> Tensor:
            last = torch.zeros(rows, 1, dtype=torch.int64, device="cuda")
            output = model.eval()(
                last,
                torch.ones_like(last),
                position_ids=last,
                past_key_values=caches.pop(),
                use_cache=True,
                logits_to_keep=1,
                return_dict=True,
            )
            sequences = torch.cat((prompts, last), 1)
            scores = kept(constrain(output.logits[:, -1].float(), sequences, settings, real), settings)
            chosen = choose(scores, settings)
            return stopping(torch.cat((sequences, chosen[:, None]), 1), scores)

        watched(token)
