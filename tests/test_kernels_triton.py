"""The Triton row function equals the torch one, on a GPU or in Triton's interpreter, and compiles for a GPU.

Without a GPU: `TRITON_INTERPRET=1 python -m pytest tests/test_kernels_triton.py` interprets the kernel, and
without the variable compiles it. Triton decides which when it is first imported, so one run cannot do both.
"""

import os

import pytest
import torch

from safeshape.kernels import fused_shaped_loss
from safeshape.kernels.rows import rows_
from safeshape.losses import DIVERGENCES
from safeshape.types import Weights

triton = pytest.importorskip("triton", reason="triton is not installed")
kernels = pytest.importorskip("safeshape.kernels.triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"
)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("softcap", [False, True])
def test_the_kernel_compiles_for_a_gpu(divergence, softcap):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernels.row_kernel.arg_names
    types = {name: "*fp32" if name.endswith("_ptr") else "fp32" for name in names}
    types |= {"label_ptr": "*i64", "vocab": "i32", "shared": "i32"}
    flags = {"CAP": softcap, "REF_CAP": softcap, "REF": True, "TAIL": True, "GRADIENT": True}
    constants = flags | {"MODE": kernels.MODES[divergence], "BLOCK": kernels.BLOCK}
    source = ASTSource(kernels.row_kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert compiled.asm["cubin"]


@runs
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("shared", [None, 40, 35, 3])
def test_triton_rows_equal_those_of_torch(monkeypatch, divergence, softcap, shared):
    monkeypatch.setattr(kernels, "BLOCK", 16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(6, 40, generator=g)
    ref = None if shared is None else 2 * torch.randn(6, shared, generator=g)
    top = shared if shared is not None and divergence in ("k2", "k3") else 40
    labels, ce, kl = torch.randint(0, top, (6,), generator=g), torch.rand(6, generator=g), torch.rand(6, generator=g)
    results = []
    for rows, where in ((kernels.rows_, device), (rows_, "cpu")):
        buffer = z.clone().to(where)
        out = rows(
            buffer,
            None if ref is None else ref.clone().to(where),
            *(x.to(where) for x in (labels, ce, kl)),
            divergence=divergence,
            softcap=softcap,
            ref_softcap=softcap,
            gradient=True,
        )
        results.append([x.cpu() for x in (buffer, *out)])
    for got, want in zip(*results, strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


@runs
def test_triton_is_chosen_by_name_and_compares_close_models_well():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(6, 5, generator=g).to(device), torch.randn(40, 5, generator=g).to(device)
    labels = torch.arange(6, device=device)
    close = (hidden, head, hidden * (1 + 1e-2), head, labels)
    weights = Weights(ce_BT=torch.zeros(6, device=device), kl_BT=torch.ones(6, device=device))
    for divergence in DIVERGENCES:
        how = {"weights": weights, "divergence": divergence, "num_tokens": 6}
        got = fused_shaped_loss(*close, **how, implementation="triton").loss.item()
        want = fused_shaped_loss(*(x.double() for x in close[:4]), labels, **how)
        assert got == pytest.approx(want.loss.item(), abs=2e-7)
